"""Models that ``fully_shard`` shards over two processes: each rank gets what the whole model gives for its samples."""

from __future__ import annotations

import datetime as dt
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_nets import ROUNDING, Net, batch, close, gradients, losses_of, pair, step
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fastgrad
from fastgrad import engine


def check(sharded: Net, whole: Net, rank: int, rounding: float = ROUNDING) -> None:
    """Compare norms, products, squares and projections in three calls, of which the last has a single sample."""
    for seed, samples in enumerate([(4, 3), (2, 5), (1, 4)]):
        data = batch(rank, seed, samples)
        expected = gradients(whole, data)
        before = [dict(module._forward_hooks) for module in sharded.modules()]
        with fastgrad.record(sharded):
            losses = losses_of(sharded, *data)
            norms = fastgrad.grad_sqnorm(losses, sharded, retain_graph=True)
            gram = fastgrad.grad_gram(losses, sharded, retain_graph=True)
            rows = fastgrad.grad_project(losses, sharded, 32, retain_graph=True)
            squares = fastgrad.grad_square_sum(losses, sharded)
        with fastgrad.record(whole):
            close(rows, fastgrad.grad_project(losses_of(whole, *data), whole, 32), rounding)
        flat = torch.cat([g.flatten(1) for g in expected], 1).double()
        close(gram, flat @ flat.T, rounding)
        for found, square, own in zip(norms, squares, expected, strict=True):
            close(found, own.double().flatten(1).square().sum(1), rounding)
            close(square, own.double().square().sum(0), rounding)
        assert before == [dict(module._forward_hooks) for module in sharded.modules()]


def mixed(rank: int) -> None:
    """Blocks and root in bfloat16: the whole network is one of bfloat16."""
    own = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    sharded, whole = pair(torch.float32, root=False, mp_policy=MixedPrecisionPolicy(**own))
    policy = MixedPrecisionPolicy(**own, output_dtype=torch.float32)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    data = batch(rank)
    with fastgrad.record(whole.bfloat16()):
        expected = fastgrad.grad_sqnorm(losses_of(whole, *data), whole)
    with fastgrad.record(sharded):
        norms = fastgrad.grad_sqnorm(losses_of(sharded, *data), sharded)
    assert all(map(torch.equal, norms, expected))


def cast(rank: int) -> None:
    """Blocks in float64 inside of a network of float32, by whose hooks their inputs and outputs are cast."""
    policy = MixedPrecisionPolicy(param_dtype=torch.float64, output_dtype=torch.float32)
    sharded, whole = pair(torch.float32, mp_policy=policy, root=False)
    for block in whole.blocks:
        block.double().register_forward_pre_hook(lambda _, args: (args[0].double(),))
        block.register_forward_hook(lambda _, args, out: out.float())
    check(sharded, whole, rank, 1e3 * torch.finfo(torch.float32).eps)


def clipped(rank: int, limits: Any = 0.5, *, replicated: bool = False, checkpoints: str = "") -> None:
    """FSDP, or ``DistributedDataParallel``, averages over ranks what each has clipped; a plain step is as always."""
    sharded, whole = pair(checkpoints=checkpoints, reshard_after_forward=True)
    if replicated:
        sharded = nn.parallel.DistributedDataParallel(pair()[1])
    bounds = limits if isinstance(limits, dict) else {"": limits}
    groups = [max((key for key in bounds if name.startswith(key)), key=len) for name, _ in whole.named_parameters()]
    for seed in range(2):
        sharded.zero_grad()
        data = batch(rank, seed)
        with fastgrad.clip_gradients(sharded, limits) as clipping:
            norms = clipping.backward(losses_of(sharded, *data))
        expected = [torch.zeros_like(p) for p in whole.parameters()]
        for other in range(2):
            own = gradients(whole, batch(other, seed))
            sqnorms = torch.stack([g.flatten(1).square().sum(1) for g in own])
            each = {key: sqnorms[[group == key for group in groups]].sum(0).sqrt() for key in bounds}
            for e, g, key in zip(expected, own, groups, strict=True):
                e += torch.einsum("b,b...->...", (bounds[key] / each[key]).clamp(max=1), g) / 2
            if other == rank:
                close(norms, torch.stack(list(each.values()), 1) if isinstance(limits, dict) else each[""])
        for p, e in zip(sharded.parameters(), expected, strict=True):
            close(p.grad if replicated else p.grad.full_tensor(), e)
        sharded.zero_grad()
        step(sharded, data)
        mean = torch.stack([gradients(whole, batch(other, seed))[0].sum(0) for other in range(2)]).mean(0)
        first = next(sharded.parameters()).grad
        close(first if replicated else first.full_tensor(), mean)


def noise(rank: int, *, replicated: bool = False) -> None:
    """Norms and noise scale of a rank's own batch, sharded or under ``DistributedDataParallel``."""
    sharded, whole = pair()
    model = nn.parallel.DistributedDataParallel(pair()[1]) if replicated else sharded
    found, expected = fastgrad.NoiseScale(), fastgrad.NoiseScale()
    data = batch(rank)
    with fastgrad.record(model):
        losses = losses_of(model, *data)
        sqnorms = torch.stack(fastgrad.grad_sqnorm(losses, model, retain_graph=True)).sum(0)
        gram = fastgrad.grad_gram(losses, model)
    found.update(sqnorms, gram.sum())
    flat = torch.cat([g.flatten(1) for g in gradients(whole, data)], 1)
    close(sqnorms, flat.square().sum(1))
    expected.update(sqnorms, flat.sum(0).square().sum())
    assert abs(found.scale / expected.scale - 1) < 1e-9


def gathers(rank: int) -> None:
    """Norms gather as often as a step of FSDP, reduce nothing, and a block holds no weights in between."""
    sharded, _ = pair(reshard_after_forward=True)
    data, counts = batch(rank), {}
    families = ("all_gather", "reduce_scatter", "all_reduce", "broadcast", "all_to_all", "gather", "scatter")
    names = [name for name in dir(distributed) if name.startswith(families)]
    kept = {name: getattr(distributed, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return kept[name](*args, **kwargs)

        return call

    def norms() -> None:
        with fastgrad.record(sharded):
            losses = losses_of(sharded, *data)
            weight = engine.sharded.whole(sharded, [sharded.blocks[0][1].weight])[0]
            assert weight.shape == (16, 8)
            assert weight.untyped_storage().size() == 0
            fastgrad.grad_sqnorm(losses, sharded)

    norms()  # the first call is compared with an ordinary one
    for name in names:
        setattr(distributed, name, counting(name))
    try:
        step(sharded, data)
        plain = dict(counts)
        counts.clear()
        norms()
    finally:
        for name in names:
            setattr(distributed, name, kept[name])
    gathered = {name: count for name, count in plain.items() if name.startswith("all_gather")}
    assert gathered
    assert len(plain) > len(gathered)
    assert counts == gathered


def raises(rank: int) -> None:
    """A model that raises on one rank, after its last block, leaves what FSDP's own remedy puts right."""
    sharded, whole = pair()
    check(sharded, whole, rank)
    sharded.fails = rank == 1
    with fastgrad.record(sharded):
        if rank == 1:
            with pytest.raises(RuntimeError, match="of the model"):
                sharded(batch(rank)[0])
        else:
            sharded(batch(rank)[0])
    sharded.fails = False
    if hasattr(sharded, "reset_iter_state"):  # which PyTorch 2.8 lacks
        sharded.reset_iter_state()
        check(sharded, whole, rank)


def refused(rank: int) -> None:
    """Samples on different paths, on both ranks."""
    sharded, _ = pair()
    sharded.reads = True
    tokens = torch.arange(20).view(4, 5) % 11 * torch.tensor([0, 1, 1, 1]).view(4, 1)
    with fastgrad.record(sharded), pytest.raises(ValueError, match="must run on all samples together where fully_sha"):
        sharded(tokens)


def skipped(rank: int) -> None:
    """A block that was never gathered has no gradient."""
    sharded, whole = pair()
    sharded.skipped = whole.skipped = 2
    data = batch(rank)
    with fastgrad.record(sharded):
        norms = fastgrad.grad_sqnorm(losses_of(sharded, *data), sharded)
    for found, own in zip(norms, gradients(whole, data), strict=True):
        close(found, own.flatten(1).square().sum(1))


def decay(rank: int) -> None:
    """A weight decay on parts has no gradient per sample."""
    part = (sharded := pair()[0]).head.weight
    with fastgrad.record(sharded):
        losses = losses_of(sharded, *batch(rank))
        with pytest.raises(ValueError, match=r"losses must depend on 'head.weight' through recorded calls"):
            fastgrad.grad_sqnorm(losses.sum() + part.to_local().square().sum(), sharded)
        fastgrad.grad_sqnorm(losses, sharded)


CASES: dict[str, Callable[[int], None]] = {
    "nested and resharded": lambda rank: check(*pair(reshard_after_forward=True), rank),
    "nested and kept": lambda rank: check(*pair(reshard_after_forward=False), rank),
    "root alone": lambda rank: check(*pair(nested=False), rank),
    "blocks alone": lambda rank: check(*pair(root=False), rank),
    "tied": lambda rank: check(*pair(tied=True), rank),
    "frozen block": lambda rank: check(*pair(frozen="blocks.0"), rank),
    "frozen part": lambda rank: check(*pair(frozen="1.weight"), rank),
    "mixed": mixed,
    "cast": cast,
    "clipped": clipped,
    "clipped by groups": lambda rank: clipped(rank, {"": 0.5, "blocks.1": 0.1}),
    "clipped and replicated": lambda rank: clipped(rank, replicated=True),
    "clipped by groups and replicated": lambda rank: clipped(rank, {"": 0.5, "blocks.1": 0.1}, replicated=True),
    "noise": noise,
    "replicated": lambda rank: noise(rank, replicated=True),
    "gathers": gathers,
    "raises": raises,
    "refused": refused,
    "skipped": skipped,
    "decay": decay,
}
if not hasattr(torch.utils.checkpoint, "_NoopSaveInputs"):  # with which vmap refuses checkpoints
    CASES |= {
        "checkpoints around": lambda rank: check(*pair(checkpoints="around", reshard_after_forward=True), rank),
        "checkpoints inside": lambda rank: check(*pair(checkpoints="inside", reshard_after_forward=True), rank),
        "checkpoints inside, kept": lambda rank: check(*pair(checkpoints="inside", reshard_after_forward=False), rank),
        "clipped and checkpointed": lambda rank: clipped(rank, checkpoints="inside"),
    }


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)  # FSDP warns of views, and loses hooks
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/file", rank=rank, world_size=2, timeout=dt.timedelta(seconds=20)
    )
    # After a failure on one rank, collectives no longer match.
    found = dict.fromkeys(CASES, "a case before failed")
    for name, case in CASES.items():
        try:
            case(rank)
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
            break
    torch.save(found, f"{folder}/rank{rank}")
    if not any(found.values()):
        distributed.barrier()
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_each_rank_gets_what_the_whole_model_gives(results: list[dict[str, str]], case: str) -> None:
    for rank, found in enumerate(results):
        assert not found[case], f"rank {rank}: {found[case]}"
