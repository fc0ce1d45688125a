"""The step of sampling on a CPU, compiled with numba: imported by the first call that needs it."""

import numpy as np
from torch import Tensor

from seqmodels.kernels.draw import Draws
from seqmodels.kernels.selective_scan_cpu import _compiled


def draw_step(
    logits: Tensor, barred: Tensor, draws: Draws, temperature: float, top_k: int, top_p: float, guidance: float,
    end: int, shortest: int,
) -> None:  # fmt: skip
    """As draw.draw_step_in_torch."""
    tensors = (logits.double() if logits.element_size() < 4 else logits, barred, *draws)
    _draw_step(*[t.numpy(force=True) for t in tensors], temperature, top_k, top_p, guidance, end, shortest)


@_compiled(error_model="numpy")
def _draw_step(
    logits, barred, uniform, steps, tokens, nats, ids, alive, temperature, top_k, top_p, guidance, end, shortest
):  # fmt: skip
    b, w = uniform.shape
    v = logits.shape[1]
    p = np.empty(v)
    for row in range(b):
        column = steps[row] % w
        for i in range(v):
            p[i] = logits[row, i]
        largest = p.max()
        log_sum = largest + np.log(np.exp(p - largest).sum())
        if guidance != 1:
            for i in range(v):
                p[i] = logits[b + row, i] + guidance * (p[i] - logits[b + row, i])
        for i in range(v):
            if barred[i] or (i == end and steps[row] < shortest):
                p[i] = -np.inf
        if temperature == 0:
            token = np.argmax(p)
        else:
            p /= temperature
            if 0 < top_k < v:
                least = np.sort(p)[v - top_k]
                for i in range(v):
                    if p[i] < least:
                        p[i] = -np.inf
            p[:] = np.exp(p - p.max())
            p /= p.sum()
            if top_p < 1:
                ordered = np.sort(p)
                before, i = 0.0, v - 1
                while i > 0 and before + ordered[i] < top_p:
                    before += ordered[i]
                    i -= 1
                least = ordered[i]
                for i in range(v):
                    if p[i] < least:
                        p[i] = 0
            goal, total, token = uniform[row, column] * p.sum(), 0.0, 0
            for i in range(v):
                if p[i] > 0:
                    token = i
                total += p[i]
                if total > goal:
                    break
        tokens[row, column] = token
        nats[row, column] = logits[row, token] - log_sum
        for copy in range(row, len(ids), b):
            ids[copy, 0] = token
        alive[row] &= token != end
        steps[row] += 1
