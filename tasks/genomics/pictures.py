"""Pictures of an evaluation: ROC and precision-recall curves, calibration, confusion matrix, predicted against true.

Curves are of each class against the rest, with the areas in the legend (scikit-learn's displays). Classes (or labels)
that are there in every sample, or in none, have no curve.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqmodels.config import Targets
from seqmodels.files import make_folder, replacing
from seqmodels.metrics import Floats

PictureFormat = Literal["png", "svg", "pdf"]
_BINS = 10  # of the calibration


class Column(NamedTuple):
    """What is true, and what is said, of a class (or of a number that is predicted)."""

    name: str
    true: NDArray[Any]
    "Whether samples are of the class (n,), or their numbers."
    said: Floats
    "Its probabilities (n,), or the numbers."
    counts: NDArray[Any] | None = None
    "How many samples (n,) each stands for; None: one."


def draw(
    folder: Path, kind: Targets, classes: tuple[str, ...], targets: NDArray, scores: Floats, title: str,
    format: PictureFormat = "png",
) -> None:  # fmt: skip
    """Writes the pictures of true labels (n, ...) and scores (n, classes) into a folder."""
    if kind == "regression":
        columns = [column for column in _columns(classes, targets, scores) if len(column.true)]
        return _write(folder, {"scatter": partial(_scatter, columns=columns)}, title, format)
    confusion = None
    if kind == "single":
        confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(confusion, (targets, scores.argmax(1)), 1)
        targets = np.eye(len(classes))[targets]
    columns = [column._replace(true=column.true > 0.5) for column in _columns(classes, targets, scores)]
    return draw_curves(folder, columns, confusion, title, "samples", format)


def draw_curves(
    folder: Path, columns: list[Column], confusion: NDArray[np.int64] | None, title: str, unit: str,
    format: PictureFormat = "png",
) -> None:  # fmt: skip
    """Writes the pictures of classes, and of their confusion matrix (true, predicted) if any, in counts of a unit."""
    told = [c for c in columns if len(c.true) and 0 < np.average(c.true, weights=c.counts) < 1]
    makers: dict[str, Callable[[Any], bool]] = {
        "roc": partial(_roc, columns=told),
        "precision-recall": partial(_precision_recall, columns=told),
        "calibration": partial(_calibration, columns=told, unit=unit),
    }
    if confusion is not None:
        names = [column.name for column in columns]
        makers["confusion"] = partial(_confusion, classes=names, confusion=confusion, unit=unit)
    _write(folder, makers, title, format)


def _write(folder: Path, makers: dict[str, Callable[[Any], bool]], title: str, format: PictureFormat) -> None:
    """Writes each picture that its maker draws on a figure, unless this says that there is nothing to show."""
    from matplotlib.figure import Figure  # no pyplot: needs no display and keeps no global state

    make_folder(folder)
    for name, maker in makers.items():
        figure = Figure(layout="constrained")
        if maker(figure):
            figure.suptitle(title)
            with replacing(folder / f"{name}.{format}") as temporary:
                figure.savefig(temporary, format=format, dpi=150)


def _columns(classes: tuple[str, ...], targets: NDArray, scores: Floats) -> Iterator[Column]:
    """Each class, of the samples (n, classes) of which it is known."""
    for name, true, score in zip(classes, targets.T, scores.T, strict=True):
        known = ~np.isnan(true)
        yield Column(name, true[known], score[known])


def _roc(figure: Any, columns: list[Column]) -> bool:
    """Part of the positives that are found against part of the negatives that are taken for them."""
    from sklearn.metrics import RocCurveDisplay

    figure.set_size_inches(5, 5)
    axes = figure.subplots()
    for name, true, p, counts in columns:
        RocCurveDisplay.from_predictions(true, p, sample_weight=counts, name=name, ax=axes)
    axes.plot([0, 1], [0, 1], "k:", linewidth=1)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    return bool(columns)


def _precision_recall(figure: Any, columns: list[Column]) -> bool:
    """Part of what is found that is right against part of the positives that are found."""
    from sklearn.metrics import PrecisionRecallDisplay

    figure.set_size_inches(5, 5)
    axes = figure.subplots()
    for name, true, p, counts in columns:
        PrecisionRecallDisplay.from_predictions(true, p, sample_weight=counts, name=name, ax=axes)
    axes.set(xlabel="recall", ylabel="precision")
    return bool(columns)


def _calibration(figure: Any, columns: list[Column], unit: str) -> bool:
    """How often a class is there where it is said to be with a probability, and how often that is said."""
    figure.set_size_inches(5, 6.5)
    curves, amounts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curves.plot([0, 1], [0, 1], "k:", linewidth=1)
    for name, true, p, counts in columns:
        p, counts = np.clip(p, 0, 1), np.ones(len(p)) if counts is None else counts  # six digits of a table
        bins = np.minimum((p * _BINS).astype(int), _BINS - 1)
        n, found, said = (np.bincount(bins, counts * of, minlength=_BINS) for of in (np.ones(len(p)), true, p))
        curves.plot(said[n > 0] / n[n > 0], found[n > 0] / n[n > 0], "s-", label=name)
        amounts.stairs(n, np.linspace(0, 1, _BINS + 1))
    if columns:  # beside the curves, which it would cover
        figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    curves.set(ylabel="part that is of the class")
    amounts.set(xlabel="probability of the class", ylabel=unit)
    return bool(columns)


def _confusion(figure: Any, classes: list[str], confusion: NDArray[np.int64], unit: str) -> bool:
    """Counts, and beside them as parts of each true class."""
    from sklearn.metrics import ConfusionMatrixDisplay

    longest, side = max(map(len, classes)), max(2.5, 0.6 * len(classes))
    figure.set_size_inches(2 * side + 1 + 0.08 * longest, side + 1.5 + 0.08 * longest)
    parts = confusion / confusion.sum(1, keepdims=True).clip(min=1)
    both = figure.subplots(1, 2, sharey=True)
    for axes, values, form, title in zip(both, (confusion, parts), ("d", ".2f"), (unit, "part of the true class"),
                                         strict=True):  # fmt: skip
        ConfusionMatrixDisplay(values, display_labels=classes).plot(
            values_format=form, xticks_rotation="vertical" if longest > 5 else "horizontal", cmap="Blues", ax=axes,
            colorbar=False,
        )  # fmt: skip
        axes.set(xlabel="predicted", ylabel="", title=title)
    both[0].set_ylabel("true")
    return True


def _scatter(figure: Any, columns: list[Column]) -> bool:
    """True against predicted numbers, each in a square of its own."""
    from sklearn.metrics import PredictionErrorDisplay

    across = min(3, len(columns)) or 1
    down = -(-len(columns) // across) or 1
    figure.set_size_inches(4.5 * across, 4.5 * down)
    for axes, (name, true, said, _) in zip(figure.subplots(down, across, squeeze=False).flat, columns, strict=False):
        PredictionErrorDisplay.from_predictions(true, said, kind="actual_vs_predicted", subsample=10_000, ax=axes,
                                                random_state=0, scatter_kwargs={"s": 8, "alpha": 0.5})  # fmt: skip
        axes.set(title=name, xlabel="predicted", ylabel="true")
    for axes in list(figure.axes)[len(columns) :]:
        axes.remove()
    return bool(columns)
