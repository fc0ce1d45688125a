"""Pictures of an evaluation: ROC and precision-recall curves, calibration, confusion matrix, predicted against true.

Curves are of each class against the rest, drawn by scikit-learn's displays, with the areas in the legend. Classes (or
labels) that are there in every sample, or in none, have no curve.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seqmodels.config import Targets
from seqmodels.files import make_folder, replacing
from seqmodels.metrics import Floats

PictureFormat = Literal["png", "svg", "pdf"]
_BINS = 10  # of the calibration


def draw(
    folder: Path, kind: Targets, classes: tuple[str, ...], targets: NDArray, scores: Floats, title: str,
    format: PictureFormat = "png",
) -> list[Path]:  # fmt: skip
    """Writes the pictures of true labels (n, ...) and scores (n, classes) into a folder, and says which there are."""
    from matplotlib.figure import Figure  # no pyplot: needs no display and keeps no global state

    makers: dict[str, Any] = {"scatter": _scatter}
    if kind != "regression":
        makers = {"roc": _roc, "precision-recall": _precision_recall, "calibration": _calibration}
    if kind == "single":
        makers["confusion"] = _confusion
    make_folder(folder)
    written = []
    for name, maker in makers.items():
        figure = Figure(layout="constrained")
        if not maker(figure, classes, targets, scores):
            continue
        figure.suptitle(title)
        path = folder / f"{name}.{format}"
        with replacing(path) as temporary:
            figure.savefig(temporary, format=format, dpi=150)
        written.append(path)
    return written


def _columns(
    classes: tuple[str, ...], targets: NDArray, scores: Floats, both: bool = True
) -> Iterator[tuple[str, NDArray[Any], Floats]]:
    """Name, true values and scores of each class, of the samples of which they are known.

    With `both`, truth is whether the class is there, and classes that always are, or never, are left out.
    """
    if targets.ndim == 1:
        targets = np.eye(len(classes))[targets]
    for name, true, score in zip(classes, targets.T, scores.T, strict=True):
        known = ~np.isnan(true)
        if not both:
            yield name, true[known], score[known]
        elif 0 < (true[known] > 0.5).sum() < known.sum():
            yield name, true[known] > 0.5, score[known]


def _roc(figure: Any, *of: Any) -> bool:
    """Part of the positives that are found against part of the negatives that are taken for them."""
    from sklearn.metrics import RocCurveDisplay

    figure.set_size_inches(5, 5)
    axes, drawn = figure.subplots(), False
    for name, true, p in _columns(*of):
        drawn = bool(RocCurveDisplay.from_predictions(true, p, name=name, ax=axes))
    axes.plot([0, 1], [0, 1], "k:", linewidth=1)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    return drawn


def _precision_recall(figure: Any, *of: Any) -> bool:
    """Part of what is found that is right against part of the positives that are found."""
    from sklearn.metrics import PrecisionRecallDisplay

    figure.set_size_inches(5, 5)
    axes, drawn = figure.subplots(), False
    for name, true, p in _columns(*of):
        drawn = bool(PrecisionRecallDisplay.from_predictions(true, p, name=name, ax=axes))
    axes.set(xlabel="recall", ylabel="precision")
    return drawn


def _calibration(figure: Any, *of: Any) -> bool:
    """How often a class is there where it is said to be with a probability, and how often that is said."""
    from sklearn.calibration import CalibrationDisplay

    figure.set_size_inches(5, 6.5)
    (curves, counts), drawn = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1)), False
    edges = np.linspace(0, 1, _BINS + 1)
    for name, true, p in _columns(*of):
        p = np.clip(p, 0, 1)  # six digits of a table
        drawn = bool(CalibrationDisplay.from_predictions(true, p, n_bins=_BINS, name=name, ax=curves))
        counts.hist(p, edges, histtype="step")
    if drawn:
        curves.get_legend().remove()  # it would cover the curves
        figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    curves.set(xlabel="", ylabel="part that is of the class")
    counts.set(xlabel="probability of the class", ylabel="samples")
    return drawn


def _confusion(figure: Any, classes: tuple[str, ...], targets: NDArray, scores: Floats) -> bool:
    """Counts, and beside them as parts of each true class."""
    from sklearn.metrics import ConfusionMatrixDisplay

    longest, side = max(map(len, classes)), max(2.5, 0.6 * len(classes))
    figure.set_size_inches(2 * side + 1 + 0.08 * longest, side + 1.5 + 0.08 * longest)
    predicted, ids = scores.argmax(1), np.arange(len(classes))
    both = figure.subplots(1, 2, sharey=True)
    for axes, normalize, form in zip(both, (None, "true"), ("d", ".2f"), strict=True):
        ConfusionMatrixDisplay.from_predictions(
            targets, predicted, labels=ids, display_labels=classes, normalize=normalize, values_format=form,
            xticks_rotation="vertical" if longest > 5 else "horizontal", cmap="Blues", ax=axes, colorbar=False,
        )  # fmt: skip
        axes.set(xlabel="predicted", ylabel="", title="samples" if normalize is None else "part of the true class")
    both[0].set_ylabel("true")
    return True


def _scatter(figure: Any, *of: Any) -> bool:
    """True against predicted numbers, each in a square of its own."""
    from sklearn.metrics import PredictionErrorDisplay

    columns = [column for column in _columns(*of, both=False) if len(column[1])]
    across = min(3, len(columns)) or 1
    down = -(-len(columns) // across) or 1
    figure.set_size_inches(4.5 * across, 4.5 * down)
    for axes, (name, true, said) in zip(figure.subplots(down, across, squeeze=False).flat, columns, strict=False):
        PredictionErrorDisplay.from_predictions(true, said, kind="actual_vs_predicted", subsample=10_000, ax=axes,
                                                random_state=0, scatter_kwargs={"s": 8, "alpha": 0.5})  # fmt: skip
        axes.set(title=name, xlabel="predicted", ylabel="true")
    for axes in list(figure.axes)[len(columns) :]:
        axes.remove()
    return bool(columns)
