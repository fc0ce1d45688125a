"""Channels split among several ops, whose gradients then lie side by side in one tensor: nothing is put together.

`split` gives views and hands each a place in the gradient of the whole. An op that can write a gradient into rows that
lie apart takes that place (`room`); what the others give is copied there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def split(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """x.split(sizes, -1)."""
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
        return x.split(list(sizes), -1)
    whole = _Whole(x, sizes)
    parts = _Split.apply(x, whole)
    for i, part in enumerate(parts):
        part.gradient_room = _Room(whole, i)
    return parts


def room(x: Tensor | None) -> "_Room | None":
    """What an op asks for, when it sees x, to be given a place for the gradient of x when it has it."""
    return getattr(x, "gradient_room", None)


class _Whole:
    """The gradient of what was split, from when the first op asks for a place in it."""

    def __init__(self, x: Tensor, sizes: Sequence[int]) -> None:
        self.form, self.sizes = {"size": x.shape, "dtype": x.dtype, "device": x.device}, list(sizes)
        self.gradient: Tensor | None = None
        self.taken: set[int] = set()

    def places(self) -> tuple[Tensor, ...]:
        """Of all parts."""
        if self.gradient is None:
            self.gradient = torch.empty(**self.form)
        return self.gradient.split(self.sizes, -1)

    def hand_over(self) -> Tensor:
        """The gradient, which belongs to somebody else now."""
        gradient, self.gradient, self.taken = self.gradient, None, set()
        return gradient


class _Room:
    """The place of one part."""

    def __init__(self, whole: _Whole, number: int) -> None:
        self.whole, self.number = whole, number

    def take(self) -> Tensor | None:
        """A place for the gradient, as large as the part; none for a second op that reads the part."""
        whole = self.whole
        if self.number in whole.taken:
            return None
        whole.taken.add(self.number)
        return whole.places()[self.number]


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: _Whole) -> tuple[Tensor, ...]:
        ctx.whole = whole
        ctx.set_materialize_grads(False)
        return x.split(whole.sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        for place, part in zip(ctx.whole.places(), gradients, strict=True):
            if part is None:
                place.zero_()
            elif part.data_ptr() != place.data_ptr() or part.stride() != place.stride():
                place.copy_(part)
        return ctx.whole.hand_over(), None
