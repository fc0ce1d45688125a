"""The step of sampling in Triton: one launch, a program per row.

Logits and exponentials are float32, sums of probabilities float64, so that the numbers drawn with meet those of the
definition but for one in some million. Nothing is sorted: the least logit that top_k or top_p keep is found by halving
the range that it must be in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqmodels.kernels.draw import Draws


def draw_step(
    logits: Tensor, barred: Tensor, draws: Draws, temperature: float, top_k: int, top_p: float, guidance: float,
    end: int, shortest: int,
) -> None:  # fmt: skip
    """As draw.draw_step_in_torch."""
    b, w = draws.uniform.shape
    v = logits.shape[1]
    with torch.cuda.device_of(logits):
        _draw_step[(b,)](
            logits, barred, *draws, logits.stride(0), float(temperature), float(top_p), float(guidance), end, shortest,
            B=b, V=v, W=w, TOP_K=top_k if 0 < top_k < v else 0, TOP_P=top_p < 1, GREEDY=temperature == 0,
            GUIDED=guidance != 1, COPIES=len(draws.ids) // b, BLOCK_V=triton.next_power_of_2(v),
            num_warps=4,
        )  # fmt: skip


@triton.jit
def _draw_step(
    logits_ptr, barred_ptr, uniform_ptr, step_ptr, tokens_ptr, nats_ptr, ids_ptr, alive_ptr, stride, temperature,
    top_p, guidance, end, shortest,
    B: tl.constexpr, V: tl.constexpr, W: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, GREEDY: tl.constexpr,
    GUIDED: tl.constexpr, COPIES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK_V)
    m_v = o_v < V
    step = tl.load(step_ptr + row)
    column = row * W + step % W
    told = tl.load(logits_ptr + row * stride + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    log_sum = tl.max(told, 0)
    log_sum += tl.log(tl.sum(tl.exp(told - log_sum), 0))
    p = told
    if GUIDED:
        untold = tl.load(logits_ptr + (B + row) * stride + o_v, mask=m_v, other=0.0).to(tl.float32)
        p = untold + guidance * (tl.where(m_v, told, 0.0) - untold)
    barred = tl.load(barred_ptr + o_v, mask=m_v, other=1) != 0
    p = tl.where(barred | ((o_v == end) & (step < shortest)), float("-inf"), p)
    if GREEDY:
        token = tl.min(tl.where(p == tl.max(p, 0), o_v, BLOCK_V), 0)
    else:
        p /= temperature
        if TOP_K > 0:
            p = tl.where(p > _below(p, tl.full([BLOCK_V], 1.0, tl.float64), TOP_K), p, float("-inf"))
        x = p - tl.max(p, 0)
        p = tl.exp(x).to(tl.float64)
        if TOP_P:
            p = tl.where(x > _below(x, p, top_p * tl.sum(p, 0)), p, 0.0)
        cumulative = tl.cumsum(p, 0)
        goal = tl.load(uniform_ptr + column) * tl.sum(p, 0)
        possible = (p > 0) & m_v
        token = tl.min(tl.where(possible & (cumulative > goal), o_v, BLOCK_V), 0)
        token = tl.minimum(token, tl.max(tl.where(possible, o_v, 0), 0))  # where rounding left none above the goal
    tl.store(tokens_ptr + column, token.to(tl.int64))
    chosen = tl.max(tl.where(o_v == token, told, float("-inf")), 0)
    tl.store(nats_ptr + column, chosen - log_sum)
    for copy in range(COPIES):
        tl.store(ids_ptr + copy * B + row, token.to(tl.int64))
    alive = tl.load(alive_ptr + row) != 0
    tl.store(alive_ptr + row, alive & (token != end))
    tl.store(step_ptr + row, step + 1)


@triton.jit
def _below(x, weight, limit):
    """A number below the least x whose larger ones together weigh less than the limit, above the next smaller x."""
    high = tl.max(x, 0)
    low = tl.min(tl.where(x > float("-inf"), x, high), 0) - 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        fits = tl.sum(tl.where(x > middle, weight, 0.0), 0) < limit
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    return low
