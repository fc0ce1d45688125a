"""Sampling: new tokens from a next-token model, row by row with random numbers of their own."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqmodels.decoding import Decoder
from seqmodels.errors import InputError

PREFILL = 65536  # positions per forward pass over a prompt: bounds memory at any length of it
CHECK = 32  # steps between looks at whether all rows have ended: a look waits for the device
DRAWS = 1024  # random numbers that a row draws at a time


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's probabilities: temperature first, then top-k, then top-p."""

    temperature: float = 1.0
    "Divides the logits; 0 takes the most likely token."
    top_k: int = 0
    "Only the k most likely tokens; 0 means all."
    top_p: float = 1.0
    "Only the most likely tokens that together reach this probability; 1 means all."

    def __post_init__(self) -> None:
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise InputError(f"temperature is {self.temperature}; expected 0 (most likely token) or more")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected more than 0 and at most 1")


@torch.inference_mode()
def sample(
    model: Any,
    ids: Tensor,
    limit: int,
    *,
    seeds: Sequence[tuple[int, ...]],
    sampling: Sampling,
    barred: Sequence[int] = (),
    end: int | None = None,
    shortest: int = 0,
    conditions: Tensor | None = None,
    progress: Callable[[int], Any] = lambda tokens: None,
) -> tuple[Tensor, Tensor, float]:
    """Tokens after ids (b, l) and their log-probabilities (b, steps) at temperature 1, and the seconds it took.

    There are `limit` steps, or fewer when every row has drawn `end`, which comes after `shortest` steps at the
    earliest; what follows it in a row means nothing. `barred` tokens are never drawn. Row i draws by seeds[i] alone.
    The seconds are without those for the prompt; `progress` is told of decoded tokens.
    """
    conditions = torch.empty(len(ids), 0, dtype=torch.int64) if conditions is None else conditions
    logits, state = prefill(model, ids, conditions, model.device)
    choose = _Chooser(model, sampling, seeds, limit, barred, end, shortest)
    started = time.perf_counter()
    with _threads(model.device, len(ids)):
        tokens, nats = _decode(Decoder(model, state, _given(conditions), choose), choose, logits, limit, progress)
    return tokens, nats, time.perf_counter() - started


class _Chooser:
    """Draws each row's next token with random numbers of its own; barred ones never, the end not before the shortest.

    All that changes from step to step is on the device, in place, so that a CUDA graph can hold a step.
    """

    def __init__(
        self, model: Any, sampling: Sampling, seeds: Sequence[tuple[int, ...]], limit: int, barred: Sequence[int],
        end: int | None, shortest: int,
    ) -> None:  # fmt: skip
        self.sampling, self.end, self.shortest, device = sampling, end, shortest, model.device
        self.generators = [np.random.default_rng(seed) for seed in seeds]
        self.barred = torch.zeros(2, model.config.vocab_size, device=device)  # [0]: while too short to end, [1]: later
        self.barred[:, list(barred)] = -torch.inf
        if end is not None:
            self.barred[0, end] = -torch.inf
        rows = len(seeds)
        self.uniform = torch.empty(rows, DRAWS, dtype=torch.float64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.empty(rows, limit, dtype=torch.int64, device=device)
        self.nats = torch.empty(rows, limit, device=device)
        self.alive = torch.ones(rows, dtype=torch.bool, device=device)

    def draw_numbers(self) -> None:
        """For the next DRAWS steps."""
        uniform = np.stack([generator.random(DRAWS) for generator in self.generators])
        self.uniform.copy_(torch.from_numpy(uniform))

    def __call__(self, logits: Tensor) -> Tensor:
        """Tokens (b, 1) from logits (b, vocab); notes them and their log-probabilities."""
        log_p = logits.float().log_softmax(-1)
        barred = self.barred.index_select(0, (self.step >= self.shortest).long())
        token = draw(log_p + barred, self.uniform.index_select(1, self.step % DRAWS), self.sampling)
        self.tokens.index_copy_(1, self.step, token)
        self.nats.index_copy_(1, self.step, log_p.gather(1, token))
        if self.end is not None:
            self.alive &= token[:, 0] != self.end
        self.step += 1
        return token


def _decode(
    decoder: Decoder, choose: _Chooser, logits: Tensor, limit: int, progress: Callable[[int], Any]
) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities (b, steps), until `limit` or until every row has ended."""
    choose.draw_numbers()
    token = choose(logits)
    for step in range(1, limit):
        if step % CHECK == 0:
            progress(CHECK * len(logits))
            if not choose.alive.any():
                return choose.tokens[:, :step], choose.nats[:, :step]
        if step % DRAWS == 0:
            choose.draw_numbers()
        token = decoder(token)
    return choose.tokens, choose.nats


@contextmanager
def _threads(device: torch.device, rows: int) -> Iterator[None]:
    """One thread while decoding a few rows on a CPU: its small products only lose by waking others (measured: 6 to 9
    times slower with two threads on two busy cores)."""
    before = torch.get_num_threads()
    if device.type == "cpu" and rows < 16:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _given(conditions: Tensor) -> Tensor | None:
    return conditions if conditions.shape[1] else None


def prefill(model: Any, ids: Tensor, conditions: Tensor, device: Any, chunk: int = PREFILL) -> tuple[Tensor, Any]:
    """Logits (b, vocab) after ids (b, l) and the state, reading at most `chunk` positions at a time."""
    state, logits = None, torch.empty(0, 1)
    for part in ids.split(max(1, chunk // len(ids)), dim=1):
        logits, state = model(part.to(device), state, conditions=_given(conditions))
    return logits[:, -1], state


def draw(log_p: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Tokens (b, 1) at the quantiles `uniform` (b, 1) in [0, 1) of exp(log_p) (b, vocab), filtered."""
    if sampling.temperature == 0:
        return log_p.argmax(-1, keepdim=True)
    if sampling.temperature != 1:
        log_p = log_p / sampling.temperature
    if 0 < sampling.top_k < log_p.shape[-1]:
        log_p = log_p.masked_fill(log_p < log_p.topk(sampling.top_k).values[:, -1:], -torch.inf)
    p = log_p.double().softmax(-1)  # float64: a token of probability zero is never drawn by rounding
    if sampling.top_p < 1:
        ordered = p.sort(descending=True).values
        kept = ordered.cumsum(-1) - ordered < sampling.top_p
        p = p * (p >= ordered.masked_fill(~kept, 2.0).amin(-1, keepdim=True))
    cumulative = p.cumsum(-1)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1, keepdim=True)
