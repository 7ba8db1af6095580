"""What `GradientFeatures`, `record`, `grad_sqnorm`, `clip_gradients` and the rules refuse, naming the argument."""

from __future__ import annotations

import pytest
import torch
from bad_arguments import Refused, refused
from small_nets import Net
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fastgrad import GradientFeatures, checks, clip_gradients, grad_sqnorm, record
from fastgrad.layers import register_rule

NET, X, Y = nn.Linear(3, 4), torch.rand(5, 3), torch.tensor([0, 3, 1, 0, 1])
COMPILED = nn.Linear(3, 4)
COMPILED.compile(backend="eager")

with checks.without_warnings():  # torch.jit is deprecated
    TRACED = torch.jit.trace(nn.Linear(4, 3), torch.rand(2, 4))
TWO, BATCH_NORM = nn.Sequential(nn.Linear(3, 3), NET), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
WITHOUT_STATISTICS = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
BAD: dict[str, Refused] = {
    **{f"{name} {entry.__name__}": (lambda entry=entry, part=part: entry(part), error, message)
       for entry in (GradientFeatures, record)
       for name, part, error, message in (
        ("complex", nn.Linear(4, 3, dtype=torch.complex64), TypeError, "parameters; 'weight' was torch.complex64"),
        ("meta", nn.Sequential(nn.Linear(4, 3, device="meta")), ValueError, "'0.weight' was on the meta device"),
        ("lazy", nn.Sequential(nn.LazyLinear(3)), ValueError, r"'0.weight' was not initialized \(call a lazy"),
        ("traced part", nn.Sequential(TRACED), TypeError, "ordinary modules; '0' was a"),
        ("traced", TRACED, TypeError, "ordinary modules; 'model' was a"))},
    "model": (lambda: GradientFeatures(torch.relu), TypeError, "model must be"),
    "no parameters": (lambda: GradientFeatures(nn.ReLU()), ValueError, "model must have parameters"),
    "no statistics": (lambda: GradientFeatures(WITHOUT_STATISTICS), ValueError, "'1' keeps no running stat"),
    "images": (lambda: GradientFeatures(nn.Conv2d(3, 4, 1))(torch.rand(5, 3, 2, 2)), ValueError, "logits of shape"),
    "no input": (lambda: GradientFeatures(NET)(), ValueError, "inputs must hold a tensor .* held none"),
    "a number": (lambda: GradientFeatures(NET)(X[0, 0]), ValueError, "inputs must hold a tensor .* held none"),
    "an array": (lambda: GradientFeatures(NET)(X.numpy()), ValueError, "inputs must hold a tensor .* held ndarray"),
    "loss": (lambda: GradientFeatures(NET, loss="hinge"), ValueError, "loss must be one of"),
    "target's name": (lambda: GradientFeatures(NET, target="zeros"), ValueError, "target must be one of"),
    "target": (lambda: GradientFeatures(NET, target=0.5), TypeError, "target must be .* 0.5"),
    "log": (lambda: GradientFeatures(NET, log=1), TypeError, "log must be .* it was 1"),
    "signals": (lambda: GradientFeatures(NET, signals=["bce"]), ValueError, "signals .* 'bce'"),
    "no signal": (lambda: GradientFeatures(NET, signals=[]), ValueError, "signals must name"),
    "no signals": (lambda: GradientFeatures(NET, signals=5), TypeError, "signals must be a sequence, .* it was 5"),
    "contrasts": (lambda: GradientFeatures(NET, signals=[("bce", "contrast")]), ValueError, "target must be one of"),
    "a target more": (lambda: GradientFeatures(NET, signals=[("bce", "ones")])(X, target=torch.zeros(5)), ValueError,
                      "target of a call must be left out where signals"),
    **{f"targets {name}": (lambda y=y: GradientFeatures(NET)(X, target=y), error, message)
       for name, y, error, message in (
        ("of some", Y[:3], ValueError, r"target must have shape \(5,\) or \(5, N\).*it was \(3,\)"),
        ("of floats", torch.zeros(5), ValueError, r"shape \(5,\) or \(5, N\).*it was \(5,\) of torch.float32"),
        ("too large", Y + 1, ValueError, "target must hold class indices from 0 to 3; it held 4"),
        ("negative", Y - 1, ValueError, "target must hold class indices from 0 to 3; it held -1"),
        ("of bools", Y.bool(), TypeError, "target must hold class indices"),
        ("in a list", [0] * 5, TypeError, "target must be a torch.Tensor"))},
    **{f"target {name}": (lambda y=y: GradientFeatures(NET, target=y)(X), error, message)
       for name, y, error, message in (
        ("bool", True, TypeError, "target must be a name, an index"),
        ("too large", 7, ValueError, "target must hold class indices from 0 to 3; it held 7"),
        ("name by function", lambda _: "zeros", ValueError, "target must be one of"),
        ("by function", lambda z: z[:2].sum(1), ValueError, r"target must have shape \(5, 4\).*it was \(2,\)"),
        ("of a batch", Y, ValueError, r"target must be one for all samples.*extractor\(x, target=y\)"))},
    "layers": (lambda: GradientFeatures(NET, layers=3), TypeError, "layers must be a sequence, .* it was 3"),
    "a layer": (lambda: GradientFeatures(NET, layers=[3]), ValueError, "layers must name .* nothing is 3"),
    "no layers": (lambda: GradientFeatures(NET, layers=[]), ValueError, "layers must name parameters; it had none"),
    "reduction": (lambda: GradientFeatures(NET, reduction="max"), ValueError, "reduction must be one of"),
    "chunk": (lambda: GradientFeatures(NET, chunk_size=0), ValueError, "chunk_size must be an integer of at least 1"),
    "impl": (lambda: GradientFeatures(NET, impl="cuda"), ValueError, "impl must be one of"),
    "memory": (lambda: GradientFeatures(NET, memory_budget=1.5), ValueError, "memory_budget .* 1.5"),
    "compiled": (lambda: record(torch.compile(NET)), TypeError, "not its compiled form"),
    "compiled in place": (lambda: record(COMPILED), ValueError, "must not be compiled in place"),
    "recorded": (lambda: record(torch.relu), TypeError, "model must be"),
    "training": (lambda: record(BATCH_NORM).__enter__(), ValueError, "batch norm '1' is in training .*model.eval"),
    "clipped": (lambda: clip_gradients(BATCH_NORM, 1.0).__enter__(), ValueError, "batch norm '1' is in training"),
    "frozen": (lambda: clip_gradients(nn.Linear(3, 4).requires_grad_(False), 1.0), ValueError, "require gradients"),
    "norm": (lambda: clip_gradients(TWO, 0.0), ValueError, r"max_norm must lie in \(0, inf\); it was 0.0"),
    "norm's type": (lambda: clip_gradients(TWO, "1"), TypeError, "max_norm must be a number; it was '1'"),
    "one norm": (lambda: clip_gradients(TWO, {"0": -1.0}), ValueError, r"max_norm\['0'\] must lie in"),
    "no norm": (lambda: clip_gradients(TWO, {"0": 1.0}), ValueError, "cover every .* nothing for '1.weight'"),
    "nowhere": (lambda: clip_gradients(TWO, {"": 1.0, "no": 1.0}), ValueError, "max_norm must name .*'no' had none"),
    "named by": (lambda: clip_gradients(TWO, {1: 1.0}), TypeError, "max_norm must name .* one name was 1"),  # type: ignore[dict-item]
    **{f"{name} {value!r}": (lambda given=given: grad_sqnorm(**given), TypeError, f"{name} must be a tensor or a seq")
       for name, value in (("losses", None), ("losses", ["x"]), ("params", 3), ("grad_outputs", 5))
       for given in [{"losses": X, "params": NET.weight, name: value}]},
    "batch_dims": (lambda: record(NET, batch_dims=1), TypeError, "batch_dims must be None, 0, or a .* it was 1"),
    "batch_dims of features": (lambda: GradientFeatures(NET, batch_dims={"x": "0"}), TypeError, "batch_dims must be"),  # type: ignore[dict-item]
    "named": (lambda: grad_sqnorm(X, dict(NET.named_parameters())), TypeError, "params must .* it was dict of str$"),
    "by frequency": (lambda: GradientFeatures(nn.Embedding(4, 5, scale_grad_by_freq=True)), ValueError,
                     "'Embedding' divides gradients by counts over the batch"),
    "no module": (lambda: register_rule(int), TypeError, "module_types"),
    "a name": (lambda: register_rule("MyLayer"), TypeError, "module_types must be .*; one was 'MyLayer'"),  # type: ignore[arg-type]
    "no modules": (lambda: register_rule(), TypeError, "at least one"),
    "rule": (lambda: register_rule(NET), TypeError, "module_types must be .*; one was Linear"),
}  # fmt: skip


test_bad_arguments = refused(BAD)


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_NARROW_DEVICES", ("cpu",))
    with pytest.raises(ValueError, match=r"parameter .weight. of model must be on a device with float64, .* on cpu"):
        record(NET)


@pytest.mark.filterwarnings("ignore")
def test_parameters_that_are_parts() -> None:
    whole, split, both = (nn.Linear(4, 3).double() for _ in range(3))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
        fully_shard(whole, mesh=mesh["data"])
        for own in (split, both):
            parallelize_module(own, mesh["tensor"], ColwiseParallel())
        fully_shard(both, mesh=mesh["data"])
        old = FullyShardedDataParallel(nn.Linear(4, 3), device_id=torch.device("cpu"))
        for entry, refused in ((GradientFeatures, (whole, split, both, old)), (record, (split, both, old))):
            for sharded in refused:
                with pytest.raises(TypeError, match=r"must hold whole parameters; .* was a (DTensor|FullySharded)"):
                    entry(sharded)
        record(whole)
    finally:
        distributed.destroy_process_group()


def test_a_batch_norm_that_changes_later() -> None:
    model, x = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), torch.rand(5, 2)
    with record(model):
        model.train()
        with pytest.raises(ValueError, match="its batch norm '1' is in training mode"):
            model(x)
    (extractor := GradientFeatures(model))(x)
    model[1].running_mean = model[1].running_var = None
    with pytest.raises(ValueError, match="batch norm '1' keeps no running statistics"):
        extractor(x)


def test_a_list_of_one_tensor_for_each_sample() -> None:
    """Their rows are no samples, though the mean over them is one of what each row gives."""
    model = Net(lambda net, xs: torch.stack([net.head(x).mean(0) for x in xs]), head=nn.Linear(3, 4))
    for count in (1, 2):
        with record(model), pytest.raises(ValueError, match="inputs must be tensors with a row for each sample"):
            model([torch.rand(5, 3) for _ in range(count)])
