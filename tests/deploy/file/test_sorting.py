"""The sorting network of compiled files against PyTorch's sort."""

import pytest
import torch

from fastgrad.deploy.file import sorting
from fastgrad.deploy.file.export import compile_function


@pytest.mark.parametrize("size", [2, 3, 5, 16, 17, 100, 256, 257, 900, 1024, 1800, 2048])
@pytest.mark.parametrize("rows", [(1,), (5,), (3, 4)])
def test_values_are_those_of_torch_sort(size, rows):
    x = torch.randn(*rows, size)
    x.view(-1)[:: max(1, size // 3)] = 0.5  # ties
    x[..., 0] = float("inf")
    values, places = sorting.sort(x)
    assert torch.equal(values, x.sort(-1).values)
    assert torch.equal(x.gather(-1, places), values)


def test_every_sequence_of_zeros_and_ones_is_sorted():
    """A network that sorts these sorts everything (Knuth, volume 3, 5.3.4)."""
    numbers = torch.arange(2**12)[:, None]
    x = (numbers >> torch.arange(12) & 1).float()
    assert torch.equal(sorting.sort(x)[0], x.sort(-1).values)


def test_a_nan_makes_its_row_nan_and_no_other():
    x = torch.randn(3, 20)
    x[1, 7] = float("nan")
    values = sorting.sort(x)[0]
    assert values[1].isnan().all()
    assert torch.equal(values[[0, 2]], x[[0, 2]].sort(-1).values)


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.rand(3, 2049), {}),
        (torch.rand(3, 1), {}),
        (torch.rand(()), {}),
        (torch.rand(3, 8), {"descending": True}),
        (torch.rand(3, 8), {"dim": 0}),
        (torch.arange(8), {}),
    ],
)
def test_other_sorts_stay_pytorchs(x, options):
    assert sorting.sort(x, **options) is NotImplemented


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_sort_becomes_comparisons_unless_its_places_are_asked_for():
    class Values(torch.nn.Module):
        def forward(self, x):
            return x.sort(-1).values

    class Both(torch.nn.Module):
        def forward(self, x):
            return tuple(x.sort(-1))

    x = torch.rand(3, 40)
    for module, sorts in ((Values(), 0), (Both(), 1)):
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
        program = program.run_decompositions(sorting.TABLE)
        assert sum("sort" in str(node.target) for node in program.graph.nodes) == sorts
        found = program.module()(torch.cat([x, -x]))
        torch.testing.assert_close(found, module(torch.cat([x, -x])), rtol=0, atol=0)


@pytest.mark.parametrize("size", [9, 512])
def test_a_compiled_file_sorts_every_number_of_rows(tmp_path, size):
    """512 fills its network without padding."""
    compile_function(lambda x: x.sort(-1).values.clone(), torch.rand(2, size), tmp_path / "sort.pt2")
    sort = torch._inductor.aoti_load_package(str(tmp_path / "sort.pt2"))
    for rows in (1, 2, 17):
        x = torch.randn(rows, size)
        assert torch.equal(sort(x), x.sort(-1).values)
