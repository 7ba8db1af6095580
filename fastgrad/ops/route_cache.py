"""Routes chosen by measuring them on the machine at hand, kept in a file.

`conv_cost` predicts from constants that were fitted on one machine. Where ``FASTGRAD_ROUTES=measured``, the first call
of a shape times the routes that come near the predicted best, on its own tensors and a chunk at a time, and later
calls and processes take the fastest. All routes are exact: a choice moves results by roundings, never by more.

Nothing is timed where a timing would be none or would end up in a graph: while tracing, on fake or meta tensors, under
a functorch transform, while a CUDA graph is captured. There a stored choice holds, or else the prediction.
"""

from __future__ import annotations

import contextvars
import functools
import json
import math
import os
import platform
import tempfile
import threading
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch

from fastgrad import checks
from fastgrad._torch import is_readable
from fastgrad.ops import conv_cost, conv_routes
from fastgrad.ops.conv_geometry import Problem
from fastgrad.ops.implementation import bind_contextvar

MODES = ("model", "measured")
#: A route predicted so many times slower than the best is not timed.
HOPELESS = 4.0
#: A route takes the place of the predicted one where it takes less than this part of its time: timings scatter.
GAIN = 0.9
#: Rounds over the routes of a shape, after one to warm up: as many as fit into the seconds within these bounds.
FEWEST, MOST, SECONDS = 3, 10, 5e-3
#: Shapes kept of one machine. Inputs of ever new sizes are not worth a timing each.
SHAPES = 4096

#: Seconds by route, the predicted one first; of every shape, of every machine.
Table = dict[str, dict[str, dict[str, float]]]

_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastgrad_routes", default=None)
_lock = threading.Lock()
_chosen: dict[tuple[conv_cost.Shape, bool, bool, torch.device, int], str] = {}


def mode() -> str:
    """``"model"`` or ``"measured"``: what `using` says, else the variable FASTGRAD_ROUTES, else ``"model"``."""
    chosen = _mode.get() or os.environ.get("FASTGRAD_ROUTES") or "model"
    checks.one_of("FASTGRAD_ROUTES", chosen, MODES)
    return chosen


def using(chosen: str) -> AbstractContextManager[None]:
    """Choose by ``chosen`` inside, in this thread (a GPU's backward pass has threads of its own)."""
    return bind_contextvar(_mode, chosen)


def path() -> Path:
    """The file: in the folder FASTGRAD_CACHE, else in ``fastgrad`` within the user's folder for caches."""
    folder = os.environ.get("FASTGRAD_CACHE")
    if folder:
        return Path(folder) / "routes.json"
    home = {"Windows": "AppData/Local", "Darwin": "Library/Caches"}.get(platform.system(), ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / home) / "fastgrad" / "routes.json"


def choose(p: Problem, shape: conv_cost.Shape) -> str:
    """The route for a problem of this shape.

    Args:
        p: The problem; timed if its shape is not known yet and timing is asked for.
        shape: Its shape.

    Raises:
        ValueError: FASTGRAD_ROUTES is neither of `MODES`.
    """
    if mode() == "model" or shape.budget is None or not shape.batch:
        return conv_cost.choose_route(shape)
    key = (shape, p.a.is_contiguous(), p.g.is_contiguous(), p.a.device, torch.get_num_threads())
    if key not in _chosen:
        here, name = machine(p.a.device, key[-1]), _name(*key[:3])
        known = stored().get(here, {})
        seconds, routes = known.get(name, {}), _worth_timing(shape)
        if not seconds or not set(seconds) <= set(conv_cost.candidates(shape)):
            if not _may_time(p) or len(known) >= SHAPES:
                return routes[0]
            seconds = dict.fromkeys(routes, 0.0)
            if len(routes) > 1:
                seconds = _measure(p, shape, routes)
                _keep(here, name, seconds)
        _chosen[key] = fastest(seconds)
    return _chosen[key]


def fastest(seconds: dict[str, float]) -> str:
    """The route that a measurement speaks for: the predicted one, which comes first, unless another is faster."""
    predicted, best = next(iter(seconds)), min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < GAIN * seconds[predicted] else predicted


def _worth_timing(shape: conv_cost.Shape) -> tuple[str, ...]:
    """The predicted best and the routes near it, in the predicted order."""
    predicted = {route: conv_cost.seconds(route, shape) for route in conv_cost.candidates(shape)}
    near = HOPELESS * min(predicted.values())
    return tuple(sorted((r for r in predicted if predicted[r] <= near), key=predicted.__getitem__))


def _may_time(p: Problem) -> bool:
    capturing = p.a.is_cuda and torch.cuda.is_current_stream_capturing()
    return is_readable(p.a, p.g) and not p.a.is_meta and not capturing


def _measure(p: Problem, shape: conv_cost.Shape, routes: tuple[str, ...]) -> dict[str, float]:
    """Seconds of each route for the whole batch, from the fastest of a few runs of one chunk."""
    dtype = torch.float64 if shape.itemsize == 8 else torch.float32
    direct, device = conv_cost.choose_direct(shape), torch.get_device_module(p.a.device)
    # One thread's own time does not count what else runs on its core. Elsewhere its clock may be too coarse.
    alone = p.a.device.type == "cpu" and torch.get_num_threads() == 1 and platform.system() == "Linux"
    clock = time.thread_time if alone else time.perf_counter
    found = dict.fromkeys(routes, math.inf)
    with torch.no_grad():
        begun = clock()
        for turn in range(1 + MOST):
            if turn > FEWEST and clock() - begun > SECONDS:
                break
            for route in routes:
                step = min(shape.batch, conv_cost.chunk_size(route, shape))
                chunk = p._replace(a=p.a[:step].to(dtype), g=p.g[:, :step].to(dtype))
                device.synchronize()
                start = clock()
                conv_routes.run(route, chunk, guarded=shape.guarded, fallback=direct)
                device.synchronize()
                if turn:
                    found[route] = min(found[route], (clock() - start) * shape.batch / step)
    return found


@functools.lru_cache
def machine(device: torch.device, threads: int) -> str:
    """What a timing holds for, beside the shape."""
    from fastgrad import __version__

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = f"{names[0] if names else platform.processor() or platform.machine()}, {threads} threads"
    return f"{device.type} {name}, torch {torch.__version__}, fastgrad {__version__}"


def _name(shape: conv_cost.Shape, *contiguous: bool) -> str:
    """A shape's name; batches count by powers of two."""
    fields = asdict(shape) | {"batch": 1 << (shape.batch - 1).bit_length(), "contiguous": contiguous}
    return ", ".join(f"{field} {value}" for field, value in fields.items())


@functools.lru_cache(maxsize=1)
def stored() -> Table:
    """All that is known, read from the file once."""
    return _read(path())


def forget() -> None:
    """Read the file again at the next choice."""
    _chosen.clear()
    stored.cache_clear()


def _read(file: Path) -> Table:
    try:
        table = json.loads(file.read_text())
        for shapes in table.values():
            for seconds in shapes.values():
                if not seconds or not all(r in conv_routes.ROUTES and s > 0 for r, s in seconds.items()):
                    raise ValueError(f"it holds {seconds!r}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{file} is ignored and will be made anew: {error}", RuntimeWarning, stacklevel=2)
        return {}
    return dict(table)


def _keep(here: str, name: str, seconds: dict[str, float]) -> None:
    """Add a shape to the file and to what is known, with all that other processes have added meanwhile.

    The file is replaced as a whole: readers see the old or the new one. Of two processes that write at once one may
    lose its shape, which is then timed again.
    """
    file = path()
    with _lock:
        known = stored()
        for other, shapes in _read(file).items():
            known[other] = {**shapes, **known.get(other, {})}
        known.setdefault(here, {})[name] = seconds
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
            with os.fdopen(handle, "w") as out:
                json.dump(known, out)
            os.replace(temporary, file)
        except OSError as error:
            warnings.warn(f"{file} cannot be written: {error}", RuntimeWarning, stacklevel=2)
