"""Channels split among several ops, whose gradients then lie side by side in one tensor: nothing is put together.

`split` gives views and hands each a place in the gradient of the whole. An op that can write a gradient into rows that
lie apart takes that place (`room`); what the others give is copied there.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def split(x: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """x (..., channels) in parts (..., *shape) of neighbouring channels; x is contiguous.

    Channels that remain belong to no part, and their gradient is 0.
    """
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling():
        return _views(x, shapes)
    whole = _Whole(x, shapes)
    parts = _Split.apply(x, whole)
    for i, part in enumerate(parts):
        part.gradient_room = _Room(whole, i)
    return parts


def room(x: Tensor | None) -> "_Room | None":
    """What an op asks for, when it sees x, to be given a place for the gradient of x when it has it."""
    return getattr(x, "gradient_room", None)


def take_all(rooms: "Sequence[_Room | None]") -> tuple[Tensor | None, ...]:
    """The places of all parts, or of none, if one has none left."""
    places = tuple(None if room is None else room.take() for room in rooms)
    return (None,) * len(places) if any(place is None for place in places) else places


def _views(x: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    sizes = [math.prod(shape) for shape in shapes]
    *parts, _ = x.split([*sizes, x.shape[-1] - sum(sizes)], -1)
    return tuple(part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))


class _Whole:
    """The gradient of what was split, from when the first op asks for a place in it."""

    def __init__(self, x: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
        self.form, self.shapes = {"size": x.shape, "dtype": x.dtype, "device": x.device}, shapes
        self.gradient: Tensor | None = None
        self.taken: set[int] = set()

    def places(self) -> tuple[Tensor, ...]:
        """Of all parts."""
        if self.gradient is None:
            self.gradient = torch.empty(**self.form)
            if (used := sum(map(math.prod, self.shapes))) < self.gradient.shape[-1]:
                self.gradient[..., used:] = 0
        return _views(self.gradient, self.shapes)

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
        return _views(x, whole.shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        for place, part in zip(ctx.whole.places(), gradients, strict=True):
            if part is None:
                place.zero_()
            elif part.data_ptr() != place.data_ptr() or part.stride() != place.stride():
                place.copy_(part)
        return ctx.whole.hand_over(), None
