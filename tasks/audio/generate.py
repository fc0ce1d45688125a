"""Sound from a model, sample by sample: prompted by labels, by the start of a recording, or by nothing."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqmodels.config import ConditionConfig
from seqmodels.errors import InputError
from seqmodels.sampling import Sampling, sample
from seqmodels.tasks.audio.waveform import MuLaw, is_audio_name, mu_law_of

SHORTEST = 0.1  # seconds before which an item may not end


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
    results, spent = [], 0.0
    for first in range(0, number, batch):
        rows = min(batch, number - first)
        tokens, nats, took = sample(
            model,
            torch.from_numpy(ids).expand(rows, -1),
            round(seconds * mu_law.sample_rate),
            seeds=[(seed, first + row) for row in range(rows)],
            sampling=sampling or Sampling(),
            barred=[mu_law.bos],
            end=mu_law.eos,
            shortest=round(SHORTEST * mu_law.sample_rate),
            conditions=given.expand(rows, -1),
            progress=progress,
        )
        results.append((tokens, nats))
        spent += took
    return _collect(results, mu_law, gain, spent)


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
