"""Scans whose sequence lies in stretches on several ranks: what passes between them, forward and backward.

A stretch maps the state S that enters it to  a S + E:  a its decay, E its end state from zero. With the pairs of all
stretches each rank has the state that enters its own, S[i+1] = a[i] S[i] + E[i], and runs the ordinary op from there.
The adjoint G passes the other way, G[i] = a[i] G[i+1] + F[i], F the gradient that reaches a stretch's start from its
own outputs. So two small exchanges per op, and every gradient is exact (kernels/README.md).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqmodels.kernels.packing import starts_of_sequences
from seqmodels.kernels.split import room


class Exchange(NamedTuple):
    """One rank's place among those that share a sequence."""

    gather: Callable[[Tensor], Tensor]
    "(...) -> (ranks, ...), the same tensor of all ranks in the sequence's order; differentiable."
    place: int
    "Number of this rank's stretch."
    continues: Tensor | None = None
    "(b,) bool: whether the stretch goes on with the sequence before it. None: all do."


def across(forward: Callable, setup_context: Callable, autograd: Callable, backward: Callable, at: int) -> Callable:
    """An op as a function of (exchange, *inputs): output and final state, as if all stretches were one sequence.

    The op is cut where states meet: forward(*inputs, enter) asks enter(end state from zero, decay) for the state that
    enters, and leaves inputs[at], the first stretch's initial state, alone; backward(*inputs, enter=enter) asks
    enter(gradient of the initial state by the output alone) for that of the final state. autograd(ctx, dy, dfinal,
    dstarts, backward) is the op's. Every rank hands in the same initial state and gets the same final state; the
    gradient of either is the sum of the ranks'.
    """

    class Across(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, exchange: Exchange, *inputs: Any) -> tuple[Tensor, Tensor]:
            def enter(E: Tensor, a: Tensor) -> Tensor:
                a = _if_continuing(exchange, a.view(*a.shape, *[1] * (E.dim() - a.dim())))
                ends, decays = exchange.gather(torch.cat([E.flatten(), a.flatten()])).split([E.numel(), a.numel()], 1)
                ends, ctx.decays = ends.unflatten(1, E.shape), decays.unflatten(1, a.shape)
                state = torch.zeros_like(E) if inputs[at] is None else inputs[at].to(E.dtype)
                states = [state]
                for end, decay in zip(ends, ctx.decays, strict=True):
                    states.append(torch.addcmul(end, decay, states[-1]))
                ctx.final = states[-1]
                return _if_continuing(exchange, states[exchange.place])

            output = forward(*inputs, enter)
            setup_context(ctx, inputs, output)
            ctx.set_materialize_grads(True)  # every rank sends what it has, also zeros
            ctx.exchange, final = exchange, ctx.final
            del ctx.final
            return output[0], final

        @staticmethod
        def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> Any:
            exchange = ctx.exchange

            def enter(F: Tensor) -> Tensor:
                F = _if_continuing(exchange, F)
                starts, finals = exchange.gather(torch.stack([F, dfinal])).unbind(1)
                G = finals.sum(0)
                for i in reversed(range(exchange.place + 1, len(starts))):
                    G = torch.addcmul(starts[i], ctx.decays[i], G)
                return G

            gradients = list(autograd(ctx, dy, None, None, partial(backward, enter=enter)))
            if exchange.place > 0 and gradients[at] is not None:
                gradients[at] = torch.zeros_like(gradients[at])
            return None, *gradients

    return Across.apply


def _if_continuing(exchange: Exchange, state: Tensor) -> Tensor:
    """state (b, ...), zero where the stretch starts a new sequence."""
    if exchange.continues is None:
        return state
    return state * exchange.continues.view(-1, *[1] * (state.dim() - 1))


def windows(
    exchange: Exchange, x: Tensor, reach: int, initial: Tensor | None = None, lengths: Tensor | None = None,
    seq_idx: Tensor | None = None, fill: float = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The `reach` inputs before this rank's stretch x (b, l, d), and the last ones of the whole: (b, reach, d) each.

    First comes x itself, for the one op that reads it further: to the gradient that this gives for x, a fresh tensor,
    that of the window is added in place. Differentiable in x and initial. `fill` stands where nothing of the same
    sequence is. A stretch may be shorter than the reach, and with lengths (b,) even empty.
    """
    b, l, d = x.shape
    rows = torch.arange(reach, device=x.device)
    end = torch.full((b,), l, device=x.device) if lengths is None else lengths
    index = end[:, None] - reach + rows  # (b, reach); negative before the stretch
    place = room(x)
    x, tail = _Rows.apply(x, index.clamp(min=0)[..., None].expand(-1, -1, d))
    if place is not None:  # its gradient passes as it is
        x.gradient_room = place
    own = end.clamp(max=reach)  # rows that the stretch decides itself
    valid = index >= 0
    if seq_idx is not None:
        run = starts_of_sequences(seq_idx).cumsum(1)
        last = run.gather(1, (end[:, None] - 1).clamp(min=0))
        valid = valid & (run.gather(1, index.clamp(min=0)) == last)
        broken = last[:, 0] > 0
        if exchange.continues is not None:
            broken = broken | ~exchange.continues
        own = torch.where(broken & (end > 0), reach, own)
    tail = tail.masked_fill(~valid[..., None], fill)
    gathered = exchange.gather(torch.cat([tail, own.to(tail.dtype)[:, None, None].expand(-1, 1, d)], 1))
    tails, counts = gathered[:, :, :reach], gathered[:, :, reach, :1].detach().long()  # (ranks, b, 1)
    found = [x.new_full((b, reach, d), fill) if initial is None else initial.to(x.dtype)]
    for tail, own in zip(tails, counts, strict=True):
        moved = found[-1].gather(1, (rows + own).clamp(max=reach - 1)[..., None].expand(-1, -1, d))
        found.append(torch.where((rows >= reach - own)[..., None], tail, moved))
    # out of one tensor, so that every rank's gradient passes through the exchange, whether it needs its result or not
    found = torch.stack(found)
    before, after = found[exchange.place], found[-1]
    if exchange.continues is not None:
        before = before.masked_fill(~exchange.continues[:, None, None], fill)
    return x, before, after


class _Rows(torch.autograd.Function):
    """x, and the rows of x (b, l, d) at an index (b, rows, d), without a gradient as large as x for the few rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        return x.view_as(x), x.gather(1, index)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, drows: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return dx.scatter_add_(1, index, drows), None
