"""One step of sampling: the next token of each row from its logits, with all that is kept from step to step in place.

    logits = u + g (c - u)   with guidance g, from rows told a condition (c) and the same rows not told it (u)
    p = softmax((logits, barred tokens without) / temperature), of the top_k largest, then of the largest that together
    reach top_p;   token = the first whose cumulated p exceeds uniform * its sum

The definition is `draw_step_in_torch`, in float64. On a CPU one compiled function does it, on NVIDIA GPUs one launch
(draw_triton.py), both in place of some twenty small ops; either without a word to the other side, so that a CUDA graph
can hold it.

Letters: b rows, v size of the vocabulary, w steps that the buffers hold.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.kernels.dispatch import triton_form

MOST = 4096  # vocabulary of the Triton form, which holds a row in one program


class Draws(NamedTuple):
    """What sampling keeps from step to step; everything is overwritten at column step % w."""

    uniform: Tensor
    "(b, w) float64 in [0, 1): the numbers to draw with; read only."
    step: Tensor
    "(b,) int64: number of the next draw, the same in each row."
    tokens: Tensor
    "(b, w) int64: drawn tokens."
    nats: Tensor
    "(b, w) float32: their log-probabilities in softmax(c) at temperature 1, nothing barred."
    ids: Tensor
    "(b, 1) int64, or (2 b, 1) with guidance: the drawn token, the model's next input."
    alive: Tensor
    "(b,) bool: rows that have not drawn the end."


def draw_step(
    logits: Tensor, barred: Tensor, draws: Draws, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    guidance: float = 1.0, end: int = -1, shortest: int = 0,
) -> None:  # fmt: skip
    """logits (b, v), or (2 b, v) with guidance other than 1: the told rows, then the others.

    barred (v,) bool is never drawn, `end` not before step `shortest` (-1: there is no end). Temperature 0 takes the
    largest logit, top_k 0 is all tokens.
    """
    options = (temperature, top_k, top_p, guidance, end, shortest)
    form = triton_form("draw", logits) if logits.shape[1] <= MOST else None
    if form is not None:
        form.draw_step(logits, barred, draws, *options)
    elif logits.device.type == "cpu":
        from seqmodels.kernels.draw_cpu import draw_step as compiled

        compiled(logits, barred, draws, *options)
    else:
        draw_step_in_torch(logits, barred, draws, *options)


def draw_step_in_torch(
    logits: Tensor, barred: Tensor, draws: Draws, temperature: float, top_k: int, top_p: float, guidance: float,
    end: int, shortest: int,
) -> None:  # fmt: skip
    """The definition; no value comes to the CPU."""
    b = len(draws.uniform)
    told = logits[:b].double()
    guided = told if guidance == 1 else logits[b:] + guidance * (told - logits[b:])
    column, at = draws.step[:1] % draws.uniform.shape[1], draws.step[:1]
    if end >= 0:
        early = (torch.arange(logits.shape[1], device=logits.device) == end) & (at < shortest)
        barred = barred | early
    uniform = draws.uniform.index_select(1, column)
    token = draw(guided.masked_fill(barred, -torch.inf), uniform, temperature, top_k, top_p)
    draws.tokens.index_copy_(1, column, token)
    draws.nats.index_copy_(1, column, told.log_softmax(-1).gather(1, token).float())
    draws.ids.copy_(token.repeat(len(draws.ids) // b, 1))
    if end >= 0:
        draws.alive.logical_and_(token[:, 0] != end)
    draws.step.add_(1)


def draw(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Tokens (b, 1) at the quantiles `uniform` (b, 1) in [0, 1) of softmax(logits / temperature) (b, v), filtered."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.double() / temperature  # float64: a token of probability zero is never drawn by rounding
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ordered = p.sort(descending=True).values
        kept = ordered.cumsum(-1) - ordered < top_p
        p = p * (p >= ordered.masked_fill(~kept, 2.0).amin(-1, keepdim=True))
    cumulative = p.cumsum(-1)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
