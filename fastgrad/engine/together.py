"""Put what samples returned and wrote in parts together as the batch's outputs, attributes and kept tensors."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgrad.engine import graph
from fastgrad.engine.outputs import Place, Stacked, join, joined, likely_join, output_name
from fastgrad.engine.recorded import Recorded
from fastgrad.engine.samples import Part
from fastgrad.engine.writes import Attribute, Entry, Snapshot, entries, mapped
from fastgrad.layers.call import Call, NotPerSampleError

Writes = dict[Attribute, Any]


def put_together(parts: list[Part], snapshot: Snapshot) -> tuple[list[Any], Writes, dict[Entry | int, Tensor]]:
    """Return the outputs and written attributes of all samples, and tensors of samples that something keeps."""
    first = parts[0]
    if any(p.output[2] != first.output[2] for p in parts):
        raise NotPerSampleError("model must return the same structure for all samples; it differs by their paths")
    index = [p.index for p in parts]
    each = zip(*(p.output[0] for p in parts), strict=True)
    leaves = [joined(own, index, output_name(name)) for own, name in zip(each, first.output[2], strict=True)]
    if first.index is None:
        assert isinstance(first.part, Call)
        return leaves, *_kept(first, first.part, snapshot)
    writes: Writes = {}
    for place in {place for p in parts for place in p.attributes}:
        name = f"attribute {snapshot.name(place)!r}"
        values = [p.attributes.get(place, snapshot.earlier((*place, None))) for p in parts]
        sizes = {(type(v), len(v) if isinstance(v, (list, dict, set, deque)) else 0) for v in values}
        if len(sizes) > 1:
            raise NotPerSampleError(f"model must give all samples the same {name}; it differs by their paths")

        def of_all(entry: Entry, value: Any, name: str = name, values: list[Any] = values) -> Any:
            own = values if entry[2] is None else [dict(_items(v))[entry[2]] for v in values]
            return joined(own, index, name)

        try:
            writes[place] = mapped(place, values[0], of_all)
        except KeyError:
            raise NotPerSampleError(f"model must give all samples the same {name}; its keys differ") from None
    for key in {key for p in parts for key in p.written}:
        every = [p.written.get(key) for p in parts]
        if any(one is None or not torch.equal(one[1], every[0][1]) for one in every):  # type: ignore[index]
            raise NotPerSampleError(
                "model must write the same to its buffers and inputs for all samples; what it writes to one of "
                f"shape {tuple(next(one for one in every if one)[0].shape)} differs between them"
            )
    return leaves, writes, {}


def _kept(part: Part, call: Call, snapshot: Snapshot) -> tuple[Writes, dict[Entry | int, Tensor]]:
    """Return the attributes that hold tensors of samples that ran together, and these tensors by their places."""
    waiting, writes = {id(t): t for t in part.kept}, {}
    found: dict[Any, Tensor] = {}
    for place, value in snapshot.attributes() if waiting else ():
        here = {entry: t for entry, t in entries(place, value, Tensor) if id(t) in waiting}
        if here:
            found |= here

            def stacked(entry: Entry, v: Any, here: Any = here) -> Any:
                return Stacked(call.physical(v)) if entry in here else v

            writes[place] = mapped(place, value, stacked)
    placed = {id(t) for t in found.values()}
    return writes, found | {n: t for n, t in enumerate(waiting.values()) if id(t) not in placed}


def _items(value: Any) -> Any:
    return value.items() if isinstance(value, dict) else enumerate(value)


def as_batch(
    parts: list[Part], leaves: list[Any], writes: Writes, places: Mapping[Any, Place], recorded: Recorded
) -> tuple[Any, Writes]:
    """Return the batch's output, and its attributes."""

    def whole(key: Any, x: Any) -> Any:
        if not isinstance(x, Stacked):
            return x
        rows = join(x.values, places[key])
        return graph.mark_returned(recorded, rows) if rows.requires_grad else rows

    recorded.places = [places.get(at) for at in range(len(leaves))]
    recorded.rows = [isinstance(x, Stacked) for x in leaves]
    output = parts[0].output[1]([whole(at, x) for at, x in enumerate(leaves)])
    return output, {place: mapped(place, value, whole) for place, value in writes.items()}


def rows_of_kept(
    kept: Mapping[Entry | int, Tensor], written: Writes, recorded: Recorded
) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of one sample that are kept somewhere, each with the batch's in its place."""
    rows = {entry: t for place, value in written.items() for entry, t in entries(place, value, Tensor)}
    found = []
    for place, tensor in kept.items():
        if isinstance(place, tuple):
            found.append((tensor, rows[place]))
            continue
        part = recorded.parts[0][1]
        assert isinstance(part, Call)
        whole = likely_join(part.physical(tensor))
        found.append((tensor, graph.mark_returned(recorded, whole) if whole.requires_grad else whole))
    return found


def replace_by(tensor: Tensor, rows: Tensor) -> None:
    """Turn a tensor of one sample into that of the batch, for all that hold it: attributes, lists, other threads."""
    with contextlib.suppress(RuntimeError):  # something inside of PyTorch refers to it
        torch.utils.swap_tensors(tensor, rows.view_as(rows))
