"""Rows with adapters of their own: both forms of the slots way against deltas applied by hand."""

from __future__ import annotations

import pytest
import torch
from lora_server.models.linear_store import LinearStore, linear_shapes
from lora_server.models.lora_linear import PagedLinears, RowGate, project_together
from lora_server.models.pages import write_pages
from lora_server.models.weights import AdapterWeights, LowRankDelta, pack

from tests.factories import TinyNet

PAGE, PAGES = 4, 3


class Paged:
    """TinyNet in float64 with three pages of four columns, and adapters `p` (rank 3) and `q` (rank 6) in them."""

    def __init__(self, *, gathered: bool) -> None:
        torch.manual_seed(0)
        self.net = TinyNet().double()
        self.plain = {path: self.net.get_submodule(path).weight.detach().clone() for path in linear_shapes(self.net)}
        self.targets = {"net": linear_shapes(self.net)}
        self.deltas = {
            "p": self._deltas(["blocks.0.to_q", "blocks.1.to_q", "conv"], 3),
            "q": self._deltas(["blocks.0.to_k", "blocks.1.to_q", "conv"], 6),
        }
        self.store = LinearStore(self.net, PAGE * PAGES)
        self.paged = PagedLinears(self.net, self.store, 8, [frozenset(self.targets["net"])])
        self.paged.gates.gathered = gathered
        self.write("p", [2])
        self.write("q", [0, 1])
        self.paged.open(PAGE * PAGES, 0)

    def _deltas(self, paths: list[str], rank: int) -> dict[str, LowRankDelta]:
        shapes = self.targets["net"]
        return {
            path: LowRankDelta(
                torch.randn(rank, shapes[path].in_features).double(),
                torch.randn(shapes[path].out_features, rank).double(),
                0.5,
            )
            for path in paths
        }

    def weights(self, name: str) -> AdapterWeights:
        return pack({"net": self.deltas[name]}, self.targets)

    def write(self, name: str, pages: list[int]) -> None:
        write_pages(self.store, "net", self.weights(name), pages, PAGE)

    def expected(self, path: str, x: torch.Tensor, scales: dict[str, float]) -> torch.Tensor:
        weight = self.plain[path].clone()
        for name, scale in scales.items():
            delta = self.deltas[name].get(path)
            if delta is not None:
                weight += (scale * delta.scaling * delta.b @ delta.a).view(weight.shape)
        module = self.net.get_submodule(path)
        if isinstance(module, torch.nn.Conv2d):
            return torch.nn.functional.conv2d(x, weight, module.bias, module.stride, module.padding)
        return torch.nn.functional.linear(x, weight, module.bias)


def gate(**scales: float) -> RowGate:
    """What a row opens: `p` lies in page 2, `q` in pages 0 and 1 with 6 of their 8 columns."""
    columns = {"p": range(8, 11), "q": range(6)}
    return RowGate({column: scale for name, scale in scales.items() for column in columns[name]})


ROWS = [{}, {"p": 1.0}, {"q": -0.5}, {"p": 0.25, "q": 2.0}]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("path", ["blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q"])
def test_each_row_has_its_own_adapters(gathered: bool, path: str) -> None:
    """Base, one, another, both at other scales: row by row what the changed weight gives."""
    paged = Paged(gathered=gathered)
    paged.paged.gates.set([gate(**scales) for scales in ROWS])
    x = torch.randn(len(ROWS), 5, 6).double()
    y = paged.net.get_submodule(path)(x)
    for row, scales in enumerate(ROWS):
        torch.testing.assert_close(y[row], paged.expected(path, x[row], scales), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gathered", [False, True])
def test_inputs_without_tokens(gathered: bool) -> None:
    """A linear of a whole row, such as a timestep's, is gated the same way."""
    paged = Paged(gathered=gathered)
    paged.paged.gates.set([gate(**scales) for scales in ROWS])
    x = torch.randn(len(ROWS), 6).double()
    y = paged.net.get_submodule("blocks.1.to_q")(x)
    for row, scales in enumerate(ROWS):
        torch.testing.assert_close(y[row], paged.expected("blocks.1.to_q", x[row], scales), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_convolution_is_a_linear_over_patches(gathered: bool) -> None:
    """Row by row what the changed kernel gives, with its stride and padding; without open columns the plain one."""
    paged = Paged(gathered=gathered)
    paged.paged.gates.set([gate(**scales) for scales in ROWS])
    x = torch.randn(len(ROWS), 3, 7, 4).double()
    y = paged.net.get_submodule("conv")(x)
    for row, scales in enumerate(ROWS):
        torch.testing.assert_close(y[row], paged.expected("conv", x[row], scales), rtol=1e-12, atol=1e-12)
    paged.paged.open(0, 0)
    torch.testing.assert_close(paged.net.get_submodule("conv")(x), paged.expected("conv", x, {}), rtol=0, atol=1e-14)


def test_projecting_together_is_projecting_one_by_one() -> None:
    """One product with all A gives what three linears give."""
    paged = Paged(gathered=False)
    paged.paged.gates.set([gate(**scales) for scales in ROWS])
    linears = [paged.net.get_submodule(path) for path in ("blocks.0.to_q", "blocks.0.to_k")]
    x = torch.randn(len(ROWS), 5, 6).double()
    for together, alone in zip(project_together(linears, x), [linear(x) for linear in linears], strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_shut_pages_leave_the_plain_linear() -> None:
    """With no columns open the output is the base model's, bit for bit, whatever the pages hold."""
    paged = Paged(gathered=False)
    paged.paged.open(0, 0)
    x = torch.randn(2, 5, 6).double()
    linear = paged.net.get_submodule("blocks.0.to_q")
    expected = torch.nn.functional.linear(x, paged.plain["blocks.0.to_q"], linear.bias)
    torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-15)


def test_a_page_forgets_its_last_tenant() -> None:
    """Modules that the new adapter does not change, and columns beyond its rank, add nothing."""
    paged = Paged(gathered=False)
    paged.write("p", [0])
    paged.paged.gates.set([RowGate(dict.fromkeys(range(PAGE), 1.0))])
    x = torch.randn(1, 5, 6).double()
    y = paged.net.get_submodule("blocks.0.to_k")(x)
    torch.testing.assert_close(y[0], paged.expected("blocks.0.to_k", x[0], {}), rtol=1e-12, atol=1e-12)
    y = paged.net.get_submodule("blocks.0.to_q")(x)
    torch.testing.assert_close(y[0], paged.expected("blocks.0.to_q", x[0], {"p": 1.0}), rtol=1e-12, atol=1e-12)


def test_a_small_class_leaves_other_linears_alone() -> None:
    """Linears outside the batch's class do not pay for the pages."""
    paged = Paged(gathered=False)
    small = frozenset({"blocks.0.to_q"})
    other = PagedLinears(paged.net, paged.store, 8, [small, frozenset(paged.targets["net"])])
    assert other.class_of(["blocks.0.to_q"]) == 0
    assert other.class_of(["blocks.0.to_q", "blocks.0.to_k"]) == 1
    other.open(PAGE, 0)
    assert [paged.net.get_submodule(path).columns for path in paged.plain] == [PAGE, 0, 0, 0]
    other.open(0, 1)
    assert [paged.net.get_submodule(path).columns for path in paged.plain] == [0, 0, 0, 0]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("path", "shape"), [("blocks.1.to_q", (5, 6)), ("blocks.1.to_q", (6,)), ("conv", (3, 7, 4))])
def test_what_overflows_in_one_row_does_not_reach_another(gathered: bool, path: str, shape: tuple[int, ...]) -> None:
    """`q` is finite and overflows with any input; rows that do not use it are what they are without it."""
    paged = Paged(gathered=gathered)
    for delta in paged.deltas["q"].values():
        delta.a.fill_(1.7e308)
    paged.write("q", [0, 1])
    paged.paged.gates.set([gate(**scales) for scales in ROWS])
    x = torch.rand(len(ROWS), *shape).double() + 1
    y = paged.net.get_submodule(path)(x)
    assert [bool(row.isfinite().all()) for row in y] == ["q" not in scales for scales in ROWS]
    for row, scales in enumerate(ROWS[:2]):
        torch.testing.assert_close(y[row], paged.expected(path, x[row], scales), rtol=1e-12, atol=1e-12)


def test_what_overflows_in_one_row_does_not_reach_another_when_projected_together() -> None:
    """The same where several linears share one product."""
    paged = Paged(gathered=False)
    paged.deltas["q"]["blocks.0.to_k"].a.fill_(1.7e308)
    paged.write("q", [0, 1])
    paged.paged.gates.set([gate(**scales) for scales in ROWS])
    linears = [paged.net.get_submodule(path) for path in ("blocks.0.to_q", "blocks.0.to_k")]
    _, keys = project_together(linears, torch.rand(len(ROWS), 5, 6).double() + 1)
    assert [bool(row.isfinite().all()) for row in keys] == [True, True, False, False]
