"""Measured routes: stored and read again, never where nothing can be timed, exact whichever is chosen."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastgrad
from fastgrad.commands import cli
from fastgrad.ops import conv_routes, route_cache
from fastgrad.ops.layer_sqnorm import conv_sqnorm


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """A cache of its own, measuring on; the shapes that were timed."""
    monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path))
    monkeypatch.setenv("FASTGRAD_ROUTES", "measured")
    route_cache.forget()
    shapes, measure = [], route_cache._measure
    monkeypatch.setattr(
        route_cache, "_measure", lambda p, shape, routes: shapes.append(shape) or measure(p, shape, routes)
    )
    yield shapes
    route_cache.forget()


@pytest.fixture
def taken(monkeypatch):
    """The routes that ran for a result."""
    names, run = [], conv_routes.run
    monkeypatch.setattr(
        "fastgrad.ops.layer_sqnorm.conv_routes.run",
        lambda route, *args, **options: names.append(route) or run(route, *args, **options),
    )
    return names


def layer(batch=4):
    torch.manual_seed(0)
    return torch.randn(batch, 8, 6, 6), torch.randn(batch, 8, 6, 6)


def test_a_choice_is_stored_and_read_again(timed, tmp_path):
    first = conv_sqnorm(*layer(), 3, padding=1)
    assert len(timed) == 1
    torch.testing.assert_close(conv_sqnorm(*layer(), 3, padding=1), first, rtol=0, atol=0)
    conv_sqnorm(*layer(3), 3, padding=1)  # the same power of two
    route_cache.forget()  # as another process
    conv_sqnorm(*layer(), 3, padding=1)
    assert len(timed) == 1
    (shapes,) = json.loads((tmp_path / "routes.json").read_text()).values()
    assert len(shapes) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["routes.json"]
    conv_sqnorm(*layer(5), 3, padding=1)
    assert len(timed) == 2


@pytest.mark.parametrize("route", ["patch", "rows", "grouped", "patch_gram", "box_gram"])
def test_the_stored_route_runs_and_is_exact(timed, taken, tmp_path, route):
    a, g = layer()
    conv_sqnorm(a, g, 3, padding=1)
    file = tmp_path / "routes.json"
    table = json.loads(file.read_text())
    for shapes in table.values():
        for name in shapes:
            shapes[name] = {"patch": 1.0, route: 0.5}
    file.write_text(json.dumps(table))
    route_cache.forget()
    taken.clear()
    norms = conv_sqnorm(a, g, 3, padding=1)
    assert set(taken) == {route}
    weight = torch.zeros(8, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    for i in range(len(a)):
        output = nn.functional.conv2d(a[i : i + 1].double(), weight, padding=1)
        (gradient,) = torch.autograd.grad(output, weight, g[i : i + 1].double())
        torch.testing.assert_close(norms[i].double(), gradient.square().sum(), rtol=100 * 2**-24, atol=0)


def test_a_route_that_cannot_serve_the_shape_is_timed_anew(timed, tmp_path):
    conv_sqnorm(*layer(), 3, padding=1)
    file = tmp_path / "routes.json"
    table = json.loads(file.read_text())
    for shapes in table.values():
        for name in shapes:
            shapes[name] = {"taps": 1e-9}
    file.write_text(json.dumps(table))
    route_cache.forget()
    conv_sqnorm(*layer(), 3, padding=1)
    assert len(timed) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"here": {"shape": {}}}', '{"here": {"shape": {"x": 1}}}', '{"a": 1}']
)
def test_a_damaged_file_is_ignored_and_made_anew(timed, tmp_path, content):
    file = tmp_path / "routes.json"
    file.write_text(content)
    with pytest.warns(RuntimeWarning, match="ignored and will be made anew"):
        norms = conv_sqnorm(*layer(), 3, padding=1)
    torch.testing.assert_close(norms, conv_sqnorm(*layer(), 3, padding=1, route="patch"), rtol=1e-5, atol=0)
    assert len(timed) == 1
    route_cache.forget()
    conv_sqnorm(*layer(), 3, padding=1)
    assert len(timed) == 1


def test_a_folder_that_cannot_be_written_costs_only_the_file(timed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning):
        conv_sqnorm(*layer(), 3, padding=1)
    conv_sqnorm(*layer(), 3, padding=1)
    assert len(timed) == 1


def test_entries_of_another_torch_are_left_alone(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "1.0")
    route_cache.machine.cache_clear()
    conv_sqnorm(*layer(), 3, padding=1)
    monkeypatch.undo()
    monkeypatch.setenv("FASTGRAD_CACHE", str(tmp_path))
    route_cache.machine.cache_clear()
    route_cache.forget()
    with route_cache.using("measured"):
        conv_sqnorm(*layer(), 3, padding=1)
    table = json.loads((tmp_path / "routes.json").read_text())
    assert sorted("torch 1.0," in here for here in table) == [False, True]
    assert list(map(len, table.values())) == [1, 1]


def test_what_another_process_wrote_is_kept(timed, tmp_path):
    conv_sqnorm(*layer(), 3, padding=1)
    file = tmp_path / "routes.json"
    table = json.loads(file.read_text())
    table["elsewhere"] = {"shape": {"patch": 1.0}}
    file.write_text(json.dumps(table))
    conv_sqnorm(*layer(), 1)
    table = json.loads(file.read_text())
    assert table["elsewhere"] == {"shape": {"patch": 1.0}}
    assert sorted(map(len, table.values())) == [1, 2]


def test_nothing_is_timed_while_tracing_or_without_values(timed):
    a, g = layer()
    call = lambda a, g: conv_sqnorm(a, g, 3, padding=1)  # noqa: E731
    with FakeTensorMode() as mode:
        assert call(mode.from_tensor(a), mode.from_tensor(g)).shape == (4,)
    assert call(a.to("meta"), g.to("meta")).shape == (4,)
    for tracing in ("real", "fake", "symbolic"):
        make_fx(call, tracing_mode=tracing)(a, g)
    torch.func.vmap(call)(a[:, None], g[:, None])  # its rule hands on ordinary tensors
    assert all(shape.guarded for shape in timed)
    timed.clear()
    torch.compile(call, backend="eager", fullgraph=True)(a, g)
    torch.compile(call, backend="aot_eager", fullgraph=True)(a, g)
    module = nn.Module()
    module.forward = call
    torch.export.export(module, (a, g))
    assert not timed


def test_networks_are_planned_without_timing_and_then_timed(timed):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    extractor = fastgrad.GradientFeatures(model)
    x = torch.randn(9, 3, 8, 8)
    _, norms = extractor(x)
    assert {shape.batch for shape in timed} == {9}
    with route_cache.using("model"):
        torch.testing.assert_close(norms, extractor(x)[1], rtol=1e-5, atol=0)


def test_doctor_tells_of_them(timed, tmp_path, capsys):
    assert cli.main(["doctor"]) == 0
    assert f"{tmp_path / 'routes.json'}: nothing measured" in capsys.readouterr().out
    conv_sqnorm(*layer(), 3, padding=1)
    assert cli.main(["doctor"]) == 0
    assert "shapes measured: 1;" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    routes = json.loads(capsys.readouterr().out)["routes"]
    assert routes["chosen_by"] == "measured"
    (found,) = routes["measured"].values()
    assert found["shapes"] == 1
    assert len(found["differ"]) == (found["time_saved"] > 0)
    assert list(routes["measured"]) == [route_cache.machine(torch.device("cpu"), torch.get_num_threads())]


def test_where_the_file_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTGRAD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert route_cache.path() == tmp_path / "fastgrad" / "routes.json"


def test_an_unknown_mode_is_refused(monkeypatch):
    monkeypatch.setenv("FASTGRAD_ROUTES", "fast")
    with pytest.raises(
        ValueError, match=r"FASTGRAD_ROUTES must be one of 'model', 'measured'; it was 'fast'"
    ):
        conv_sqnorm(*layer(), 3, padding=1)
