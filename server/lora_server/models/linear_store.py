"""The weights of one component's linears and convolutions, stacked by shape, with room for resident adapters.

    stack[g] is (L, out, in + K):   [ W | B of the pages ]      for linears
    stack[g] is (L, out, in) and b[g] (L, out, K)               for convolutions, in = in_channels * kh * kw
    a[g]     is (L, K, in):           A of the pages

W is stored once: the module's own `weight` becomes the strided part of the stack, which the base and the merged way
use, and which the slots way extends. A convolution's W stays in one piece, because its kernels would copy it each time
otherwise. One kernel reaches all modules of a shape, so changing an adapter costs a few launches and not hundreds.
Owned by the engine thread.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lora_server.models.weights import LinearGroup, LinearShape, linear_groups

_MAX_INDICES = 1024


def linear_shapes(root: nn.Module) -> dict[str, LinearShape]:
    """Lists every module of *root* that adapters may change by its path, in the order of its modules."""
    shapes = ((path, _shape(module)) for path, module in root.named_modules())
    return {path: shape for path, shape in shapes if shape is not None}


def _shape(module: nn.Module) -> LinearShape | None:
    """The shape of a linear or a plain convolution; None for others."""
    if isinstance(module, nn.Linear):
        return LinearShape(module.out_features, module.in_features)
    if not isinstance(module, nn.Conv2d):
        return None
    # Not subclasses, which may compute something else: those of `lora_linear` say that they do not.
    plain = type(module) is nn.Conv2d or getattr(module, "is_plain", False)
    if plain and module.groups == 1 and module.padding_mode == "zeros":
        height, width = module.kernel_size
        return LinearShape(module.out_channels, module.in_channels * height * width, (height, width))
    return None


class LinearStore:
    """The stacks of one component.

    Attributes:
        groups: The linears by shape.
        columns: K, the columns of the pages; 0 if the component is only ever merged.
    """

    def __init__(self, root: nn.Module, columns: int = 0) -> None:
        """Moves the weights of all linears and convolutions of *root* into stacks; their values do not change."""
        self.groups: tuple[LinearGroup, ...] = linear_groups(linear_shapes(root))
        self.columns = columns
        self._stacks = [self._stack(root, group) for group in self.groups]
        self._a = [self._pages(stack, group) for stack, group in zip(self._stacks, self.groups, strict=True)]
        self._b = [self._page_columns(stack, group) for stack, group in zip(self._stacks, self.groups, strict=True)]
        self._indices: dict[tuple[int, ...], Tensor] = {}

    def base(self, group: int) -> Tensor:
        """W of all modules of a group, (L, out, in), a strided view."""
        return self._stacks[group][:, :, : self.groups[group].shape.in_features]

    def extended(self, group: int) -> Tensor:
        """W and the B columns of all pages, (L, out, in + K); of a group of linears."""
        assert self.groups[group].shape.kernel is None
        return self._stacks[group]

    def page_b(self, group: int, first: int, last: int) -> Tensor:
        """The B columns *first* to *last* of all modules of a group, (L, out, last - first), a view."""
        return self._b[group][:, :, first:last]

    def page_a(self, group: int, first: int, last: int) -> Tensor:
        """The A rows *first* to *last* of all modules of a group, (L, last - first, in), a view."""
        return self._a[group][:, first:last]

    def all_page_a(self, group: int) -> Tensor:
        """A of all pages, (L, K, in)."""
        return self._a[group]

    def all_page_b(self, group: int) -> Tensor:
        """B of all pages, (L, out, K), for linears a strided view."""
        return self._b[group]

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
        in_features = group.shape.in_features
        columns = self.columns if group.shape.kernel is None else 0
        shape = (len(modules), group.shape.out_features, in_features + columns)
        stack = torch.zeros(shape, dtype=like.dtype, device=like.device)
        for k, module in enumerate(modules):
            assert isinstance(module.weight, Tensor)
            weight = stack[k, :, :in_features].view(module.weight.shape)
            weight.copy_(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
        return stack

    def _pages(self, stack: Tensor, group: LinearGroup) -> Tensor:
        return stack.new_zeros((stack.shape[0], self.columns, group.shape.in_features))

    def _page_columns(self, stack: Tensor, group: LinearGroup) -> Tensor:
        if group.shape.kernel is None:
            return stack[:, :, group.shape.in_features :]
        return stack.new_zeros((*stack.shape[:2], self.columns))


def stores(components: Mapping[str, nn.Module], denoiser: str, columns: int) -> dict[str, LinearStore]:
    """Makes a store for each component; only the denoiser's has room for pages."""
    return {name: LinearStore(root, columns if name == denoiser else 0) for name, root in components.items()}
