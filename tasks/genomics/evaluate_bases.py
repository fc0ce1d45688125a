"""`longseq dna evaluate` of models that label bases: metrics per base, in memory that hardly grows with the genome.

Of each class against all others: precision, recall, F1, MCC and AUROC over bases; over all classes accuracy, their mean
recall (balanced accuracy) and mean F1, and MCC. What cannot be said (of a class that does not occur) is None.

Neighbouring bases are no independent samples: intervals resample blocks of 10,000 labelled bases. AUROC is that of the
log-odds of a class against the others in steps of 1/1024, between -32 and 32: equal ones are ties.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from seqmodels.display import aligned
from seqmodels.errors import InputError
from seqmodels.heads import IGNORED
from seqmodels.metrics import mcc_of
from seqmodels.tasks.genomics.annotation import BACKGROUND
from seqmodels.tasks.genomics.bases import LabelledBases, load_bases
from seqmodels.tasks.genomics.inference import BaseClassifier
from seqmodels.tasks.genomics.pictures import Column, PictureFormat, draw_curves

Floats = NDArray[np.float64]
BLOCK = 10_000
"Labelled bases that are resampled together."
OVERALL = ("accuracy", "balanced_accuracy", "macro_f1", "mcc")
EACH = ("precision", "recall", "f1", "mcc", "auroc")
_STEPS, _REACH = 1024, 32  # of log-odds


def evaluate_bases(
    classifier: BaseClassifier,
    data: Path,
    annotation: Sequence[Path],
    features: str | None,
    *,
    within: Path | None,
    region: Sequence[str],
    resamples: int,
    seed: int,
    pictures: Path | None,
    picture_format: PictureFormat,
    quiet: bool,
) -> dict[str, Any]:
    """The results of a model on the records of FASTA files (or regions of them), as BaseTally gives them, and drawn."""
    stranded = classifier.complement != list(range(len(classifier.classes)))
    named = {name[:-1] if stranded else name for name in classifier.classes if name != BACKGROUND}
    if features is None and len(named) > 1:
        raise InputError(
            f"the model tells {', '.join(sorted(named))}: name them with --features, of those that overlap first the "
            "one that counts, as for its training"
        )
    if features is not None and named != (given := {name.strip() for name in features.split(",")}):
        raise InputError(f"features are {', '.join(sorted(given))}, but the model tells {', '.join(sorted(named))}")
    features = features or "".join(named)
    records = load_bases(data, annotation, features, stranded=stranded, within=within, region=",".join(region))
    for note in records.labels.notes:
        print(f"longseq: {note}", file=sys.stderr)
    counts = tally(classifier, records, quiet)
    if pictures is not None:
        draw_curves(pictures, counts.columns(), counts.confusion, f"{counts.bases} bases", "bases", picture_format)
    return counts.results(resamples=resamples, seed=seed)


def measure_bases(model: Path, records: LabelledBases, device: str) -> dict[str, Any]:
    """The results, without intervals, of the model in a folder."""
    return {"window": None, **tally(BaseClassifier(str(model), device), records, quiet=True).results(resamples=0)}


def tally(classifier: BaseClassifier, records: LabelledBases, quiet: bool) -> "BaseTally":
    """The counts of a model on labelled bases, each stretch read by itself."""
    counts = BaseTally(classifier.classes)
    with tqdm(total=records.bases, unit="base", unit_scale=True, disable=quiet or not sys.stderr.isatty()) as progress:
        for stretch in records.stretches:
            at = stretch.start
            parts, why = classifier.read(tokens for tokens, _ in records.taking([stretch]).blocks())
            if parts is None:
                raise InputError(why)
            for logits in parts:
                own = replace(stretch, start=at, end=at + len(logits))
                counts.add(records.of(own)[1], logits)
                progress.update(len(own))
                at = own.end
            counts.end_stretch()
    if not counts.bases:
        raise InputError("no base here has a label; there is nothing to measure")
    return counts


def shown(result: dict[str, Any], classes: Sequence[str]) -> str:
    """Results as text: over all classes, of each class, and the confusion matrix in bases."""

    def number(values: dict[str, float | None]) -> str:
        value, low, high = (values.get(key) for key in ("value", "low", "high"))
        text = "-" if value is None else f"{value:.4f}"
        return text if low is None or high is None else f"{text} ({low:.3f} to {high:.3f})"

    metrics = result["metrics"]
    whole = [{"metric": name, "value": number(metrics[name])} for name in OVERALL]
    each = [
        {"class": name, "bases": result["bases"][name]} | {m: number(metrics[f"{name} {m}"]) for m in EACH}
        for name in classes
    ]
    counts = zip(classes, result["confusion"], strict=True)
    confusion = [{"true \\ predicted": name, **dict(zip(classes, row, strict=True))} for name, row in counts]
    title = f"{result['n']} bases, with 95 % intervals from blocks of {BLOCK}"
    return "\n".join([title, *(aligned(rows, [*rows[0]]) for rows in (whole, each, confusion))])


class BaseTally:
    """Counts of bases by true and predicted class, and of log-odds."""

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self._blocks: list[NDArray[np.int64]] = []  # (classes, classes) each
        self._room = 0  # bases that the last block still takes
        self._histogram = np.zeros((len(classes), 2, 2 * _REACH * _STEPS), dtype=np.int64)

    @property
    def bases(self) -> int:
        """Labelled bases so far."""
        return int(np.sum(self._blocks))

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Bases (true, predicted) by class."""
        return np.sum(self._blocks, axis=0)

    def columns(self) -> list[Column]:
        """For each class, how many bases of it, and of the others, have which probability."""
        odds = (np.arange(self._histogram.shape[2]) + 0.5) / _STEPS - _REACH
        found = []
        for name, counts in zip(self.classes, self._histogram, strict=True):
            true, bins = np.nonzero(counts)
            found.append(Column(name, true == 1, 1 / (1 + np.exp(-odds[bins])), counts[true, bins]))
        return found

    def end_stretch(self) -> None:
        """What comes next is no neighbour of what has come."""
        self._room = 0

    def add(self, labels: NDArray[np.int64], logits: NDArray[Any]) -> None:
        """Takes in logits (l, classes) of the next bases with their true labels (l,)."""
        known, k = labels != IGNORED, len(self.classes)
        labels, logits = labels[known], logits[known].astype(np.float64)
        pairs = labels * k + logits.argmax(1)
        while len(pairs):
            if not self._room:
                self._blocks.append(np.zeros((k, k), dtype=np.int64))
                self._room = BLOCK
            taken, pairs = pairs[: self._room], pairs[self._room :]
            self._blocks[-1] += np.bincount(taken, minlength=k * k).reshape(k, k)
            self._room -= len(taken)
        for label in range(k):
            others = np.delete(logits, label, axis=1)
            top = others.max(1)
            odds = logits[:, label] - top - np.log(np.exp(others - top[:, None]).sum(1))
            bins = np.floor((odds + _REACH) * _STEPS).clip(0, 2 * _REACH * _STEPS - 1).astype(np.int64)
            for side, chosen in enumerate((labels != label, labels == label)):
                self._histogram[label, side] += np.bincount(bins[chosen], minlength=self._histogram.shape[2])

    def results(self, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """`metrics` ({name: {value, low, high}}, those of a class as '<class> f1'), `confusion` and `bases` of a class.

        `low` and `high` are percentile intervals of 95 %; AUROC has none. There is at least one labelled base.
        """
        k = len(self.classes)
        blocks = np.array(self._blocks, dtype=np.float64)
        points = self._metrics(blocks.sum(0, keepdims=True))
        intervals: dict[str, Floats] = {}
        if resamples:
            rng = np.random.default_rng(seed)
            weights = rng.multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), size=resamples)
            drawn = (weights @ blocks.reshape(len(blocks), -1)).reshape(-1, k, k)
            intervals = self._metrics(drawn)
        metrics: dict[str, Any] = {}
        for name, (value,) in points.items():
            metrics[name] = {"value": float(value) if np.isfinite(value) else None}
            if intervals and np.isfinite(intervals[name]).any():
                low, high = np.nanpercentile(intervals[name], (2.5, 97.5)).tolist()
                metrics[name] |= {"low": low, "high": high}
        areas = self._areas()
        metrics |= {f"{name} auroc": {"value": area} for name, area in zip(self.classes, areas, strict=True)}
        confusion = self.confusion
        bases = dict(zip(self.classes, confusion.sum(1).tolist(), strict=True))
        return {"n": int(confusion.sum()), "metrics": metrics, "confusion": confusion.tolist(), "bases": bases}

    def _metrics(self, confusion: Floats) -> dict[str, Floats]:
        """Metrics (resamples,) of confusion matrices (resamples, true, predicted)."""
        hits, n = np.einsum("rkk->rk", confusion), confusion.sum((1, 2))[:, None]
        true, said = confusion.sum(2), confusion.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            each = {"precision": hits / said, "recall": hits / true}
            each["f1"] = np.where(true > 0, 2 * hits / (true + said), np.nan)
        against = np.stack([n - true - said + hits, said - hits, true - hits, hits], 2)  # tn, fp, fn, tp
        against = against.reshape(*hits.shape, 2, 2)
        each["mcc"] = np.stack([mcc_of(against[:, i]) for i in range(len(self.classes))], 1)
        there = np.flatnonzero(np.sum(self._blocks, axis=(0, 2)))  # classes that occur
        found = {"accuracy": hits.sum(1) / n[:, 0], "mcc": mcc_of(confusion)}
        found |= {"balanced_accuracy": np.nanmean(each["recall"][:, there], axis=1)}
        found |= {"macro_f1": np.nanmean(each["f1"][:, there], axis=1)}
        for i, name in enumerate(self.classes):
            found |= {f"{name} {metric}": values[:, i] for metric, values in each.items()}
        return found

    def _areas(self) -> list[float | None]:
        """Area under the ROC curve of each class."""
        areas: list[float | None] = []
        for false, true in self._histogram.astype(np.float64):
            pairs = true.sum() * false.sum()
            below = false.cumsum() - false / 2
            areas.append(float((true * below).sum() / pairs) if pairs else None)
        return areas
