"""The linear weights of one component, stacked by shape, with room beside each for the columns of resident adapters.

    stack[g] is (L, out, in + K):   [ W | B of the pages ]
    a[g]     is (L, K, in):           A of the pages

W is stored once: the module's own `weight` becomes the strided part of the stack, which the base and the merged way
use, and which the slots way extends. One kernel reaches all linears of a shape, so changing an adapter costs a few
launches and not hundreds. Owned by the engine thread.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_server.models.weights import LinearGroup, LinearShape, linear_groups

_MAX_INDICES = 1024


def linear_shapes(root: nn.Module) -> dict[str, LinearShape]:
    """Lists every linear of *root* by its path, in the order of its modules."""
    return {
        path: LinearShape(module.out_features, module.in_features)
        for path, module in root.named_modules()
        if isinstance(module, nn.Linear)
    }


class LinearStore:
    """The stacks of one component.

    Attributes:
        groups: The linears by shape.
        columns: K, the columns of the pages; 0 if the component is only ever merged.
    """

    def __init__(self, root: nn.Module, columns: int = 0) -> None:
        """Moves the weights of all linears of *root* into stacks; their values do not change."""
        self.groups: tuple[LinearGroup, ...] = linear_groups(linear_shapes(root))
        self.columns = columns
        self._stacks = [self._stack(root, group) for group in self.groups]
        self._a = [self._page_rows(stack) for stack in self._stacks]
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def base(self, group: int) -> Tensor:
        """W of all linears of a group, (L, out, in), a strided view."""
        return self._stacks[group][:, :, : self.groups[group].shape.in_features]

    def extended(self, group: int) -> Tensor:
        """W and the B columns of all pages, (L, out, in + K)."""
        return self._stacks[group]

    def page_b(self, group: int, first: int, last: int) -> Tensor:
        """The B columns *first* to *last* of all linears of a group, (L, out, last - first), a view."""
        in_features = self.groups[group].shape.in_features
        return self._stacks[group][:, :, in_features + first : in_features + last]

    def page_a(self, group: int, first: int, last: int) -> Tensor:
        """The A rows *first* to *last* of all linears of a group, (L, last - first, in), a view."""
        return self._a[group][:, first:last]

    def all_page_a(self, group: int) -> Tensor:
        """A of all pages, (L, K, in)."""
        return self._a[group]

    def index(self, members: tuple[int, ...]) -> Tensor:
        """*members* as a tensor on the device; made once for each set that adapters use, within a bound."""
        found = self._indices.get(members)
        if found is None:
            if len(self._indices) >= _MAX_INDICES:  # block scales make sets at a caller's pleasure
                self._indices.clear()
            found = self._indices[members] = torch.tensor(members, device=self._stacks[0].device)
        return found

    def _stack(self, root: nn.Module, group: LinearGroup) -> Tensor:
        modules = [root.get_submodule(path) for path in group.paths]
        like = modules[0].weight
        assert isinstance(like, Tensor)
        shape = (len(modules), group.shape.out_features, group.shape.in_features + self.columns)
        stack = torch.zeros(shape, dtype=like.dtype, device=like.device)
        for k, module in enumerate(modules):
            weight = stack[k, :, : group.shape.in_features]
            assert isinstance(module.weight, Tensor)
            weight.copy_(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
        return stack

    def _page_rows(self, stack: Tensor) -> Tensor:
        in_features = stack.shape[2] - self.columns
        return stack.new_zeros((stack.shape[0], self.columns, in_features))


def stores(components: Mapping[str, nn.Module], denoiser: str, columns: int) -> dict[str, LinearStore]:
    """Makes a store for each component; only the denoiser's has room for pages."""
    return {name: LinearStore(root, columns if name == denoiser else 0) for name, root in components.items()}
