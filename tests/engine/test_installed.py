"""Private names of the installed PyTorch that the engine stands on, and all modules that PyTorch itself tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_oracle import loss_norms, relative_error
from small_nets import recorded
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgrad import _torch


def test_levels_of_vmap() -> None:
    """A function may run one level lower, on the batch behind a tensor, and its result may come back."""
    x, seen = torch.randn(5, 2, 3), []

    def one(row: Tensor) -> Tensor:
        level, dim = _torch.functorch.maybe_get_level(row), _torch.functorch.maybe_get_bdim(row)
        seen.append((level == _torch.functorch.maybe_current_level(), dim, _torch.functorch.is_batchedtensor(row)))
        batch = _torch.functorch.get_unwrapped(row)
        with _torch.lowered():
            assert not _torch.is_transformed()
            out = batch.movedim(dim, 0).mean(0, keepdim=True).expand(5, 2, 3) * 2
        assert _torch.is_transformed()
        found: Tensor = _torch.functorch._add_batch_dim(out, 0, level)
        return found

    for batch in (x, x.movedim(0, 2).contiguous().movedim(2, 0)):
        torch.testing.assert_close(_torch.vmap(one)(batch), 2 * x.mean(0).expand(5, 2, 3))
    assert seen[0] == (True, 0, True)


def test_functions_that_modes_see() -> None:
    """Layers and cells of PyTorch call the functions that have rules, by the objects that the tables hold."""
    from fastgrad.layers import ENTERED, RULES

    seen: set[Any] = set()

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 4, 4)
    layers = [nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1), nn.LayerNorm(4), nn.RMSNorm(4)]
    layers += [nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.InstanceNorm1d(4, affine=True), nn.Dropout()]
    layers += [nn.RNN(4, 4), nn.LSTM(4, 4), nn.GRU(4, 4), nn.MultiheadAttention(4, 2), nn.MaxPool1d(2)]
    for layer in layers:
        seen.clear()
        with Watch():
            layer(x, x, x) if isinstance(layer, nn.MultiheadAttention) else layer(x)
        assert seen & {*RULES, *ENTERED}, layer
    for cell in (nn.LSTMCell(4, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 4)):
        seen.clear()
        with Watch():
            cell(x[0])
        assert seen & ENTERED.keys(), cell


def test_numbers_and_hooks_of_the_graph() -> None:
    begin = _torch.next_number()
    out = F.linear(torch.ones(2, 3, requires_grad=True), torch.ones(3, 3))
    assert begin <= _torch.number_of(out.grad_fn) < _torch.next_number()
    assert _torch.saved_tensor_hooks() is None
    with torch.autograd.graph.save_on_cpu():
        assert _torch.saved_tensor_hooks() is not None
        with _torch.saving_plainly():
            assert _torch.saved_tensor_hooks() is None
    assert not _torch.in_backward()
    inside = []
    out.register_hook(lambda _: inside.append(_torch.in_backward()))
    out.sum().backward()
    assert inside == [True]


def samples_of(info: Any, training: bool) -> Any:
    return info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=training)


def check_sample(info: Any, sample: Any) -> str:
    """Whether the norms are those of the loop, or the model is refused by name; "" without a certain batch."""
    given, forward = sample.constructor_input, sample.forward_input
    module = info.module_cls(*given.args, **given.kwargs).double().eval()
    tensors = [t for t in (*forward.args, *forward.kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    if not list(module.parameters()) or not tensors or len({len(t) for t in tensors}) > 1 or len(tensors[0]) < 2:
        return ""
    samples = len(tensors[0])
    if samples in (size for t in tensors for size in t.shape[1:]):
        return ""

    def losses(rows: slice) -> Tensor:
        args, kwargs = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t[rows] if t.dim() else t, (forward.args, forward.kwargs)
        )
        out = module(*args, **kwargs)
        floats = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        if any(t.dim() < 2 or (rows.start is None and samples not in t.shape) for t in floats):
            raise LookupError("an output of all samples")
        # Sums of squares of normalised values are constants.
        return sum((t.pow(3).sum() for t in floats), torch.zeros(()))

    try:
        losses(slice(None))
        truth = loss_norms((losses(slice(i, i + 1)) for i in range(samples)), module)
    except Exception:
        return "invalid"
    try:
        found = recorded(module, lambda: losses(slice(None)))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"refused: {error}" if " must " in str(error) else f"foreign {type(error).__name__}: {error}"
    wrong = found.shape != truth.shape or relative_error(found, truth, 2e-16).max() > 1e-8
    return "wrong" if wrong else "right"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_modules_of_pytorchs_own_tests() -> None:
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import module_db

    found, bad = Counter[str](), []
    for info in module_db:
        for sample in samples_of(info, training=False):
            torch.manual_seed(0)
            verdict = check_sample(info, sample)
            found[verdict.partition(":")[0]] += 1
            if verdict.partition(":")[0] not in ("", "invalid", "right", "refused"):
                bad.append((info.name, sample.constructor_input.args, sample.constructor_input.kwargs, verdict))
    assert not bad, bad
    assert found["right"] > 250, found
