"""Bits per sample of recordings under a model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from seqmodels.config import ConditionConfig
from seqmodels.heads import IGNORED
from seqmodels.tasks.audio.datasets import Clips, batches
from seqmodels.tasks.audio.generate import Heard, label_ids
from seqmodels.tasks.audio.waveform import mu_law_of


@dataclass(frozen=True)
class Scores:
    """Per clip: the bits of its samples, their number, and the bits of its end."""

    bits: np.ndarray
    samples: np.ndarray
    end_bits: np.ndarray

    def bits_per_sample(self, clips: Any = slice(None)) -> float:
        """Mean over all samples of the chosen clips."""
        return float(self.bits[clips].sum() / self.samples[clips].sum())

    def interval(self, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """Bootstrap interval of `bits_per_sample`, clips drawn with replacement."""
        chosen = np.random.default_rng(seed).integers(0, len(self.bits), (draws, len(self.bits)))
        means = self.bits[chosen].sum(1) / self.samples[chosen].sum(1)
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


@torch.inference_mode()
def score(
    model: Any,
    clips: Clips,
    *,
    batch_tokens: int = 65536,
    longest: int | None = None,
    progress: Any = lambda n: None,
) -> Scores:
    """Scores of every clip as recorded, told its labels and its text, on the device of the model.

    Clips of similar length go through the model together, at most `batch_tokens` positions at a time; longer ones in
    chunks with the state handed on, so that any length fits. With `longest` clips are cut into pieces of so many
    samples, of each of which the model knows nothing before it begins.
    """
    device = next(model.parameters()).device
    end = clips.mu_law.eos
    bits, end_bits = np.zeros(len(clips)), np.zeros(len(clips))
    for batch in batches(clips, batch_tokens, longest=longest):
        rows = batch["clips"].numpy()
        labels = batch["conditions"].to(device) if "conditions" in batch else None
        state, chunk = None, max(1, batch_tokens // len(rows))
        for ids, targets in zip(batch["ids"].split(chunk, 1), batch["targets"].split(chunk, 1), strict=True):
            ids, targets = ids.to(device), targets.to(device)
            logits, state = model(ids, state, conditions=labels)
            nats = F.cross_entropy(logits.float().mT, targets, ignore_index=IGNORED, reduction="none")
            in_bits = nats.double() / math.log(2)
            np.add.at(bits, rows, in_bits.masked_fill(targets == end, 0).sum(1).cpu().numpy())
            np.add.at(end_bits, rows, in_bits.masked_fill(targets != end, 0).sum(1).cpu().numpy())
        progress(len(rows))
    return Scores(bits, clips.lengths[0] - 1, end_bits)


# what score_recording gives
COLUMNS = {"file": str, "start": float, "end": float, "samples": int, "bits_per_sample": float, "end_bits": float}


@torch.inference_mode()
def score_recording(
    model: Any,
    source: str | Path,
    labels: Mapping[str, str],
    text: str | None = None,
    *,
    window: float | None = None,
    chunk: int = 16384,
) -> list[dict[str, Any]]:
    """Rows of COLUMNS for a recording of any length, one for all of it or one per `window` seconds of it.

    It is read in blocks, of which `chunk` samples go through the model at a time, the state handed on.
    """
    mu_law = mu_law_of(model.config.tokenizer)
    given = label_ids(model.config.conditions, labels).to(model.device)
    words = mu_law.text_tokens(text)
    heard = Heard(source, mu_law)
    width = heard.length if window is None else max(1, round(window * mu_law.sample_rate))
    bits, state = np.zeros(-(-heard.length // width)), None

    def read(ids: np.ndarray) -> torch.Tensor:
        nonlocal state
        logits, state = model(
            torch.from_numpy(ids)[None].to(model.device), state, conditions=given if given.shape[1] else None
        )
        return logits[0]

    # the logits before the first sample, then of each chunk those before its first sample and all but the last of it
    last, place = read(np.append(words, mu_law.bos))[-1:], 0
    for block in heard.ids():
        for start in range(0, len(block), chunk):
            ids = block[start : start + chunk]
            logits = torch.cat([last, read(ids)])
            found = F.cross_entropy(logits[:-1].float(), torch.from_numpy(ids).to(model.device), reduction="none")
            into = (place + np.arange(len(ids))) // width
            np.add.at(bits, into, found.double().cpu().numpy() / math.log(2))
            last, place = logits[-1:], place + len(ids)
    end_bits = -float(last[0].double().log_softmax(-1)[mu_law.eos]) / math.log(2)
    rows = []
    for i, total in enumerate(bits):
        first, stop = i * width, min((i + 1) * width, heard.length)
        about = {"file": str(source), "start": first / mu_law.sample_rate, "end": stop / mu_law.sample_rate}
        rows.append(about | {"samples": stop - first, "bits_per_sample": float(total) / (stop - first)})
        rows[-1]["end_bits"] = end_bits if window is None else None
    return rows


def report(scores: Scores, conditions: Sequence[ConditionConfig], ids: np.ndarray) -> dict[str, Any]:
    """JSON-ready results: the mean, its 95 % interval over clips, the end, and the mean per value of each condition."""
    low, high = scores.interval()
    by: dict[str, Any] = {}
    for i, condition in enumerate(conditions):
        groups = {value: np.flatnonzero(ids[:, i] == j) for j, value in enumerate(condition.values)}
        by[condition.name] = {value: _summary(scores, clips) for value, clips in groups.items() if len(clips)}
    whole = _summary(scores, np.arange(len(scores.bits)))
    return {**whole, "interval_95": [low, high], "end_bits_per_clip": float(scores.end_bits.mean()), "by": by}


def _summary(scores: Scores, clips: np.ndarray) -> dict[str, Any]:
    samples = int(scores.samples[clips].sum())
    return {"bits_per_sample": scores.bits_per_sample(clips), "clips": len(clips), "samples": samples}


def as_table(results: dict[str, Any]) -> str:
    """The report as a short table in text."""
    low, high = results["interval_95"]
    rows = [("all", "", results)]
    rows += [(name, value, summary) for name, group in results["by"].items() for value, summary in group.items()]
    width = max(len(f"{name} {value}") for name, value, _ in rows)
    lines = [f"{'':{width}}  {'clips':>6}  {'samples':>9}  bits/sample"]
    for name, value, summary in rows:
        numbers = f"{summary['clips']:6}  {summary['samples']:9}  {summary['bits_per_sample']:11.3f}"
        lines.append(f"{f'{name} {value}':{width}}  {numbers}")
    lines.append(
        f"95 % interval over clips: {low:.3f} to {high:.3f}; end: {results['end_bits_per_clip']:.2f} bits/clip"
    )
    return "\n".join(lines)
