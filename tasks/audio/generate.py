"""Sound from a model, sample by sample: prompted by labels, by the start of a recording, or by nothing."""

import difflib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqmodels.config import ConditionConfig
from seqmodels.decoding import Decoder
from seqmodels.errors import InputError
from seqmodels.tasks.audio.waveform import MuLaw, is_audio_name, mu_law_of

PREFILL = 65536  # positions per forward pass over a prompt: bounds memory at any length of it
CHECK = 32  # steps between looks at whether all items have ended: a look waits for the device
DRAWS = 1024  # random numbers that a row draws at a time
SHORTEST = 0.1  # seconds before which an item may not end


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


@dataclass(frozen=True)
class Generated:
    """What `generate` made: per item its new samples, their tokens, and what the model thinks of them."""

    samples: list[np.ndarray]
    "Per item (l,) float32, at the level of the prompt if there was one."
    tokens: list[np.ndarray]
    "Per item (l,) int64, without BOS and EOS."
    bits_per_sample: list[float]
    "Per item, mean of -log2 p of its samples under the model at temperature 1, without the end."
    ended: list[bool]
    "Per item, whether the model ended it (otherwise the limit did)."
    sample_rate: int
    "Hz."
    samples_per_second: float
    "Speed of decoding, all items together, without the prompt."


@torch.inference_mode()
def generate(
    model: Any,
    *,
    labels: Mapping[str, str] | None = None,
    prompt: np.ndarray | None = None,
    prompt_rate: int | None = None,
    seconds: float = 2.0,
    number: int = 1,
    batch: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda samples: None,
) -> Generated:
    """At most `seconds` of new sound, `number` times; item i depends on (seed, i) and not on `number`.

    `labels` gives values of the model's conditions by name. `prompt` (l,) is a recording at `prompt_rate` Hz (None:
    the model's rate) that the new sound goes on from. `batch` items are decoded together (None: 1 on a CPU, 256 on a
    GPU): more are faster, but products of another size round differently, which can change an item in the end. So can
    another device. `progress` is told of decoded samples.
    """
    mu_law = mu_law_of(model.config.tokenizer)
    if not 1 <= seconds * mu_law.sample_rate < math.inf:
        raise InputError(f"seconds is {seconds}; expected at least one sample, 1 / {mu_law.sample_rate} s")
    device = next(model.parameters()).device
    batch = batch if batch is not None else 1 if device.type == "cpu" else 256
    for name, value in (("number", number), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    given = label_ids(model.config.conditions, labels or {}).to(device)
    gain, ids = 1.0, np.array([mu_law.bos])
    if prompt is not None:
        heard, gain = mu_law.tokens(prompt, prompt_rate or mu_law.sample_rate)
        ids = np.concatenate([ids, heard])
    limit, results, spent = round(seconds * mu_law.sample_rate), [], 0.0
    for first in range(0, number, batch):
        rows = min(batch, number - first)
        conditions = given.expand(rows, -1)
        logits, state = prefill(model, torch.from_numpy(ids).expand(rows, -1), conditions, device)
        seeds = [(seed, first + row) for row in range(rows)]
        choose = _Chooser(mu_law, sampling or Sampling(), seeds, limit, device)
        started = time.perf_counter()
        with _threads(device, rows):
            decoder = Decoder(model, state, _given(conditions), choose)
            results.append(_decode(decoder, choose, logits, limit, progress))
        spent += time.perf_counter() - started
    return _collect(results, mu_law, gain, spent)


class _Chooser:
    """Draws each row's next token with random numbers of its own; BOS never, EOS not before the shortest length.

    All that changes from step to step is on the device, in place, so that a CUDA graph can hold a step.
    """

    def __init__(
        self, mu_law: MuLaw, sampling: Sampling, seeds: list[tuple[int, int]], limit: int, device: torch.device
    ) -> None:
        self.sampling, self.eos = sampling, mu_law.eos
        self.generators = [np.random.default_rng(seed) for seed in seeds]
        self.shortest = round(SHORTEST * mu_law.sample_rate)
        self.barred = torch.zeros(2, mu_law.vocab_size, device=device)  # [0]: while too short to end, [1]: later
        self.barred[:, mu_law.bos] = self.barred[0, mu_law.eos] = -torch.inf
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
        self.alive &= token[:, 0] != self.eos
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


def _collect(results: list[tuple[Tensor, Tensor]], mu_law: MuLaw, gain: float, seconds: float) -> Generated:
    kept, bits, ended = [], [], []
    for tokens, nats in results:
        for row, row_nats in zip(tokens.cpu().numpy(), nats.double().cpu().numpy(), strict=True):
            ends = np.flatnonzero(row == mu_law.eos)
            length = int(ends[0]) if len(ends) else len(row)
            kept.append(row[:length])
            bits.append(float(-row_nats[:length].mean() / math.log(2)))
            ended.append(len(ends) > 0)
    return Generated(
        samples=[(mu_law.decode(row) / np.float32(gain)).astype(np.float32) for row in kept],
        tokens=kept,
        bits_per_sample=bits,
        ended=ended,
        sample_rate=mu_law.sample_rate,
        samples_per_second=sum(tokens.numel() for tokens, _ in results) / max(seconds, 1e-9),
    )


def label_ids(conditions: tuple[ConditionConfig, ...], labels: Mapping[str, str]) -> Tensor:
    """Ids (1, conditions) int64 of labels by name; a condition without a label is "not given"."""
    names = [condition.name for condition in conditions]
    for name in labels:
        if name not in names:
            raise InputError(f"the model has no condition {name!r}{_nearest(name, names)}")
    ids = []
    for condition in conditions:
        value = labels.get(condition.name)
        if value is not None and value not in condition.values:
            raise InputError(f"{condition.name} has no value {value!r}{_nearest(value, condition.values)}")
        ids.append(len(condition.values) if value is None else condition.values.index(value))
    return torch.tensor([ids], dtype=torch.int64).reshape(1, -1)


def prompt_labels(
    conditions: tuple[ConditionConfig, ...], prompt: str | None, given: Mapping[str, str]
) -> tuple[dict[str, str], Path | None]:
    """Labels by condition name, and the recording to go on from: what a prompt in words means to a model.

    A prompt that is a file or has the suffix of one is a recording; any other must be a value of one condition.
    """
    labels = dict(given)
    if prompt is None:
        return labels, None
    if is_audio_name(prompt) or Path(prompt).is_file():
        return labels, Path(prompt)
    owners = [condition.name for condition in conditions if prompt in condition.values]
    if len(owners) > 1:
        raise InputError(
            f"the prompt {prompt!r} is a value of {' and '.join(owners)}; use --label {owners[0]}={prompt}"
        )
    if not owners:
        values = [value for condition in conditions for value in condition.values]
        raise InputError(
            f"the prompt {prompt!r} is neither a recording nor a label of the model{_nearest(prompt, values)}"
        )
    if labels.get(owners[0], prompt) != prompt:
        raise InputError(
            f"the prompt {prompt!r} and the label {owners[0]}={labels[owners[0]]} differ; give one of them"
        )
    return labels | {owners[0]: prompt}, None


def _nearest(word: str, words: Any) -> str:
    if not words:
        return "; it was trained without labels"
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    listed = ", ".join(words[:40]) + (", ..." if len(words) > 40 else "")
    return f"{f'; did you mean {close[0]!r}?' if close else ';'} It knows {listed}"
