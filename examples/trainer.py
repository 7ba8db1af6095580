"""Log the gradient norm of every sample in a Hugging Face ``Trainer``."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fastgrad


class NormTrainer(Trainer):
    """Keep the gradient norm of every training sample, step by step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norms: list[torch.Tensor] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Take the loss sample by sample, read the norms, return the mean loss."""
        labels = inputs.pop("labels")
        with fastgrad.record(model):
            outputs = model(**inputs)
            losses = cross_entropy(outputs.logits, labels, reduction="none")
            if model.training:
                parameters = [p for p in model.parameters() if p.requires_grad]
                sqnorms = fastgrad.grad_sqnorm(losses.sum(), parameters, retain_graph=True)
                self.norms.append(torch.stack(sqnorms).sum(0).sqrt())
        return (losses.mean(), outputs) if return_outputs else losses.mean()


def main() -> None:
    """Train a tiny network for three steps and print the largest norm of each."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    samples = [{"input_ids": torch.randint(50, (12,)), "labels": i % 2} for i in range(32)]
    arguments = TrainingArguments(
        "trainer",
        max_steps=3,
        per_device_train_batch_size=8,
        report_to=[],
        save_strategy="no",
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    trainer = NormTrainer(BertForSequenceClassification(config), arguments, train_dataset=samples)
    trainer.train()
    for step, norms in enumerate(trainer.norms):
        print(f"step {step}: largest norm {norms.max():.3f} of {len(norms)} samples")


if __name__ == "__main__":
    main()
