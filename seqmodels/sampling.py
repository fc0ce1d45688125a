"""Sampling: new tokens from a next-token model, row by row with random numbers of their own."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqmodels.decoding import Decoder
from seqmodels.errors import InputError
from seqmodels.kernels.draw import Draws, draw_step

PREFILL = 65536  # positions per forward pass over a prompt: bounds memory at any length of it
CHECK = 256  # steps between looks at whether all rows have ended: a look waits for the device
DRAWS = 1024  # steps whose random numbers, tokens and log-probabilities are on the device at a time


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the model's probabilities: temperature first, then top-k, then top-p."""

    temperature: float = 1.0
    "Divides the logits; 0 takes the most likely token."
    top_k: int = 0
    "Only the k most likely tokens; 0 means all."
    top_p: float = 1.0
    "Only the most likely tokens that together reach this probability; 1 means all."
    guidance: float | None = None
    """Logits u + guidance * (c - u) of a model told the conditions (c) and not told them (u): classifier-free guidance
    (Ho and Salimans, 2022). 1 is c alone; above, the conditions say more; 0 is u. None: see `guided_by`."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise InputError(f"temperature is {self.temperature}; expected 0 (most likely token) or more")
        if self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise InputError(f"guidance is {self.guidance}; expected a number, 1 for none")

    def guided_by(self, model: Any, told: Any) -> "Sampling":
        """The same where its guidance is a number; otherwise with the model's own if it is told anything, else 1."""
        usual = model.config.guidance if told else 1.0
        return replace(self, guidance=usual if self.guidance is None else self.guidance)


class Kept(NamedTuple):
    """Where a `Sampler` stands: all that another one, here or elsewhere, needs to go on as this one would."""

    model: Any
    "State of the model after the last token but one."
    ids: Tensor
    "(rows, 1) int64: the last token, which the model has not read."
    alive: Tensor
    "(b,) bool: rows that have not drawn the end."
    step: int
    "Tokens drawn so far."


class Sampler:
    """Draws tokens that go on from a prompt, as many at a time as are asked for.

    Row i draws by seeds[i] alone. `barred` tokens are never drawn, `end` not before step `shortest`. With guidance the
    model reads 2 b rows, the first b told their conditions, the others not.

    Nothing waits for the device from step to step; all that changes stays there in place, for a CUDA graph.
    """

    def __init__(
        self, model: Any, after: "tuple[Tensor, Any] | Kept", *, seeds: Sequence[tuple[int, ...]], sampling: Sampling,
        barred: Sequence[int] = (), end: int | None = None, shortest: int = 0, conditions: Tensor | None = None,
    ) -> None:  # fmt: skip
        """after: the logits (rows, vocabulary) after the prompt and the model's state, or what `keep` gave."""
        device, b, guidance = model.device, len(seeds), 1.0 if sampling.guidance is None else sampling.guidance
        rows = b if guidance == 1 else 2 * b
        kept = after if isinstance(after, Kept) else None
        logits, state = (None, kept.model) if kept else after
        found = len(kept.ids) if kept else len(logits)
        if found != rows:
            raise InputError(
                f"the state has {found} rows, but this sampling needs {rows}; go on with the same settings"
            )
        self._first, self._step = logits, kept.step if kept else 0
        self._seeds, self._device, self._rows = seeds, device, rows
        self._barred = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self._barred[list(barred)] = True
        self._draws = Draws(
            uniform=torch.empty(b, DRAWS, dtype=torch.float64, device=device),
            step=torch.full((b,), self._step, device=device),
            tokens=torch.empty(b, DRAWS, dtype=torch.int64, device=device),
            nats=torch.empty(b, DRAWS, device=device),
            ids=kept.ids.clone() if kept else torch.empty(rows, 1, dtype=torch.int64, device=device),
            alive=kept.alive.clone() if kept else torch.ones(b, dtype=torch.bool, device=device),
        )
        self._options: dict[str, Any] = {
            "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p,
            "guidance": guidance, "end": -1 if end is None else end, "shortest": shortest,
        }  # fmt: skip
        self._decoder = Decoder(model, state, conditions, self._draw)
        self._draw_numbers()

    @torch.inference_mode()
    def __call__(self, steps: int) -> tuple[Tensor, Tensor]:
        """The next tokens (b, steps) and their log-probabilities at temperature 1; after a row's end, nothing means."""
        tokens, nats = [], []
        with _threads(self._device, self._rows):
            while steps:
                column = self._step % DRAWS
                if column == 0:
                    self._draw_numbers()
                count = min(steps, DRAWS - column)
                for _ in range(count):
                    self._next()
                steps -= count
                tokens.append(self._draws.tokens[:, column : column + count].clone())
                nats.append(self._draws.nats[:, column : column + count].clone())
        return torch.cat(tokens, 1), torch.cat(nats, 1)

    @property
    def alive(self) -> Tensor:
        """(b,) bool: rows that have not drawn the end."""
        return self._draws.alive

    def keep(self) -> Kept:
        """Where this sampler stands now; its own going on does not change it."""
        return Kept(self._decoder.state, self._draws.ids.clone(), self._draws.alive.clone(), self._step)

    def _next(self) -> None:
        if self._first is not None:
            self._draw(self._first)
            self._first = None
        else:
            self._decoder(self._draws.ids)
        self._step += 1

    def _draw(self, logits: Tensor) -> Tensor:
        draw_step(logits, self._barred, self._draws, **self._options)
        return self._draws.ids

    def _draw_numbers(self) -> None:
        """The random numbers of the DRAWS steps around the next one."""
        begun = self._step - self._step % DRAWS
        numbers = []
        for seed in self._seeds:
            generator = np.random.default_rng(seed)
            generator.bit_generator.advance(begun)
            numbers.append(generator.random(DRAWS))
        self._draws.uniform.copy_(torch.from_numpy(np.stack(numbers)))


@torch.inference_mode()
def sample(
    model: Any,
    ids: Tensor,
    limit: int,
    *,
    seeds: Sequence[tuple[int, ...]],
    sampling: Sampling,
    barred: Sequence[int] = (),
    progress: Callable[[int], Any] = lambda tokens: None,
) -> tuple[Tensor, Tensor]:
    """`limit` tokens after ids (b, l) and their log-probabilities (b, limit) at temperature 1, by a `Sampler`.

    `progress` is told of decoded tokens.
    """
    sampler = Sampler(model, prefill(model, [ids]), seeds=seeds, sampling=sampling, barred=barred)
    return run(sampler, limit, progress=progress)[:2]


def run(
    sampler: Sampler, limit: int, *, progress: Callable[[int], Any] = lambda tokens: None
) -> tuple[Tensor, Tensor, float]:
    """`limit` tokens (b, limit), fewer once all rows have ended; their log-probabilities; and the seconds it took."""
    parts, started = [], time.perf_counter()
    for begun in range(0, limit, CHECK):
        parts.append(sampler(min(CHECK, limit - begun)))
        progress(parts[-1][0].numel())
        if not sampler.alive.any():
            break
    tokens, nats = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    return tokens, nats, time.perf_counter() - started


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


@torch.inference_mode()
def prefill(
    model: Any, blocks: Iterable[Tensor], conditions: Tensor | None = None, chunk: int = PREFILL
) -> tuple[Tensor, Any]:
    """Logits (b, vocab) after a prompt, and the state; the prompt comes in blocks (b, l), which together may be longer
    than memory, and is read at most `chunk` positions at a time."""
    state, logits = None, torch.empty(0, 1)
    for block in blocks:
        if block.shape[1] == 0:
            continue
        for part in block.split(max(1, chunk // len(block)), dim=1):
            logits, state = model(part.to(model.device), state, conditions=conditions)
    return logits[:, -1], state
