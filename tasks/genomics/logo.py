"""Pictures of what each base contributes: a sequence logo, and below it the change that every exchange makes.

matplotlib alone: each letter is its outline in DejaVu Sans, which comes with it, stretched to its height.
"""

import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqmodels.errors import InputError
from seqmodels.files import replacing
from seqmodels.table import check_writable

BASES = "ACGT"
PER_ROW = 100  # bases
_COLOURS = {"A": "#109648", "C": "#255c99", "G": "#f7a81b", "T": "#d62839"}
_FORMATS = (".png", ".svg", ".pdf")
_DPI = 120
# inches
_BASE, _LOGO, _MAP, _TICKS, _TITLE, _LEFT, _RIGHT, _GAP = 0.13, 1.1, 0.55, 0.5, 0.35, 0.9, 1.1, 0.06
_LETTER, _LONGEST = 0.09, 150  # of a title: width of a letter, about, and how many are shown
_PLAIN = {"parse_math": False}  # a $ in a name is a $


class Panel(NamedTuple):
    """One stretch of n bases and what they contribute to one score."""

    title: str
    seq: str
    "Name of the sequence, on which positions are counted."
    positions: NDArray[np.int64]
    "(n,) rising or falling, to be written at the axis."
    letters: str
    "The bases (n,)."
    heights: NDArray[np.float64]
    "(n,) importance; NaN where there is no letter."
    changes: NDArray[np.float64]
    "(n, 4) change of the score with A, C, G, T in the place; NaN where there is none."
    score: str
    "What the score is."


def check_picture(path: Path) -> None:
    """An InputError if no picture can be written to `path`: asked before long work."""
    if path.suffix not in _FORMATS:
        raise InputError(f"{path} has no suffix of a picture; use one of {', '.join(_FORMATS)}")
    check_writable(path)


def write_picture(path: Path, panels: list[Panel]) -> None:
    """Writes panels below each other, in the format of the suffix."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of names that the font lacks letters of
        draw(panels).savefig(temporary, format=path.suffix[1:], dpi=_DPI)


def draw(panels: list[Panel]) -> Any:
    """A matplotlib Figure of panels; each row of at most PER_ROW bases has the axes of a logo and of a heat map."""
    from matplotlib.figure import Figure  # no pyplot: needs no display and keeps no global state

    rows = [-(-len(panel.letters) // PER_ROW) for panel in panels]
    columns = min(PER_ROW, max(len(panel.letters) for panel in panels))
    row_height = _LOGO + _GAP + _MAP + _TICKS
    longest = _LETTER * min(_LONGEST, max(len(panel.title) for panel in panels))
    width = _LEFT + max(columns * _BASE + _RIGHT, longest)
    height = sum(_TITLE + n * row_height for n in rows) + 0.1
    figure = Figure(figsize=(width, height))

    def axes(top: float, tall: float, bases: int, left: float = _LEFT) -> Any:
        return figure.add_axes((left / width, (top - tall) / height, bases * _BASE / width, tall / height))

    top = height
    for panel, n in zip(panels, rows, strict=True):
        figure.text(
            _LEFT / width, (top - 0.7 * _TITLE) / height, panel.title[:_LONGEST], fontsize=10, weight="bold", **_PLAIN
        )
        top -= _TITLE
        limits = _limits(panel.heights)
        largest = max(np.nanmax(np.abs(panel.changes), initial=0), np.finfo(float).tiny)
        for start in range(0, n * PER_ROW, PER_ROW):
            part = slice(start, start + PER_ROW)
            bases = len(panel.letters[part])
            logo = axes(top, _LOGO, bases)
            _draw_logo(logo, panel.letters[part], panel.heights[part])
            logo.set(ylim=limits, xticks=[])
            logo.set_ylabel("importance", fontsize=8)
            heat = axes(top - _LOGO - _GAP, _MAP, bases)
            image = _draw_changes(heat, panel.letters[part], panel.changes[part], largest)
            _mark_positions(heat, panel.positions[part], panel.seq)
            if not start:
                bar = axes(top - _LOGO - _GAP, _MAP, 1, _LEFT + (bases + 1) * _BASE)
                figure.colorbar(image, cax=bar)
                bar.tick_params(labelsize=6)
                bar.set_ylabel(f"change of\n{panel.score}", fontsize=7)
            top -= row_height
    return figure


def _limits(heights: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.nanmin(heights, initial=0), np.nanmax(heights, initial=0)
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _draw_logo(axes: Any, letters: str, heights: NDArray[np.float64]) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.transforms import Affine2D

    axes.axhline(0, color="0.6", linewidth=0.5)
    for at, (letter, height) in enumerate(zip(letters, heights, strict=True)):
        if not np.isnan(height):
            place = Affine2D().scale(0.92, height).translate(at - 0.46, 0)  # upside down below the line
            axes.add_patch(PathPatch(_outline(letter).transformed(place), color=_COLOURS[letter], linewidth=0))
    axes.set_xlim(-0.5, len(letters) - 0.5)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


@cache
def _outline(letter: str) -> Any:
    """The outline of a letter, one wide and one high."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    path = TextPath((0, 0), letter, size=1, prop=FontProperties(family="DejaVu Sans", weight="bold"))
    box = path.get_extents()
    return path.transformed(Affine2D().translate(-box.x0, -box.y0).scale(1 / box.width, 1 / box.height))


def _draw_changes(axes: Any, letters: str, changes: NDArray[np.float64], largest: float) -> Any:
    """A row of squares for each of A, C, G, T; a dot marks the base that is there."""
    from matplotlib import colormaps

    colours = colormaps["RdBu_r"].with_extremes(bad="0.85")
    image = axes.imshow(changes.T, cmap=colours, vmin=-largest, vmax=largest, aspect="auto", interpolation="nearest")
    at, there = np.array([(i, BASES.index(base)) for i, base in enumerate(letters) if base in BASES]).reshape(-1, 2).T
    axes.scatter(at, there, s=2, color="0.3", linewidths=0)
    axes.set_yticks(range(4), BASES, fontsize=7)
    return image


def _mark_positions(axes: Any, positions: NDArray[np.int64], seq: str) -> None:
    every = next((step for step in (1, 2, 5) if len(positions) <= 4 * step), 10)
    marked = np.flatnonzero(positions % every == 0)
    axes.set_xticks(marked, [f"{position:,}" for position in positions[marked]], fontsize=7)
    axes.set_xlabel(f"position on {seq[:_LONGEST]} (the first base is 1)", fontsize=7, **_PLAIN)
