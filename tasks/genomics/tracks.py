"""Tracks for genome browsers: the probability (or value) of each class along sequences, and the class called.

A base of several windows has the mean of theirs. Files are sorted by sequence (bytes of the name) and start, without
overlaps, and end where the sequences end. They have no track lines, which most tools refuse.

    PREFIX.<class>.bedgraph   seq, start, end, probability
    PREFIX.<class>.bw         the same as bigWig, through pyBigWig
    PREFIX.<class>.bed        seq, start, end, class, 1000 * probability, .
    PREFIX.labels.bed         stretches whose class is the same, joined; the score is 1000 * its mean probability, and
                              the last column of nine a colour for each class
"""

import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seqmodels.errors import InputError
from seqmodels.files import replacing
from seqmodels.table import Row, check_writable

TrackFormat = Literal["bedgraph", "bigwig", "bed"]
_SUFFIX = {"bedgraph": "bedgraph", "bigwig": "bw", "bed": "bed"}
_COLOURS = ["0,114,178", "230,159,0", "0,158,115", "204,121,167", "213,94,0", "86,180,233", "240,228,66", "120,120,120"]
"Okabe and Ito's, which most people can tell apart."


class Tracks:
    """Gathers the rows of windows or intervals, in any order, and writes their tracks."""

    def __init__(self, prefix: Path, format: TrackFormat = "bedgraph") -> None:
        if format == "bigwig":
            _bigwig()
        check_writable(Path(f"{prefix}.labels.bed"))
        self._prefix, self._format = prefix, format
        self._files: dict[str, str] = {}
        self._places: dict[str, array[int]] = {}
        self._chances: dict[str, array[float]] = {}
        self._ends: dict[str, int] = {}
        self._classes: tuple[str, ...] = ()

    def add(self, rows: list[Row], classes: tuple[str, ...], prefix: str = "p_") -> None:
        """Takes in rows with scores in the columns <prefix><class>; of sequences with the same name the first alone."""
        self._classes = classes
        for row in rows:
            seq = row["seq"]
            if row["status"] == "duplicate" or self._files.setdefault(seq, row["file"]) != row["file"]:
                continue
            self._ends[seq] = max(self._ends.get(seq, 0), row["end"])
            if row.get(f"{prefix}{classes[0]}") is not None:
                self._places.setdefault(seq, array("q")).extend((row["start"], row["end"]))
                # six digits, as in the table: what is resumed gives the same tracks
                self._chances.setdefault(seq, array("d")).extend(
                    float(f"{float(row[f'{prefix}{c}']):.6g}") for c in classes
                )

    def write(self, lengths: Mapping[str, int], called: bool = True) -> list[Path]:
        """Writes the files, each at once; `lengths` are those of sequences where they are known.

        `called` says whether each place has one class, the most likely one.
        """
        known = {seq: lengths.get(seq, end) for seq, end in self._ends.items() if seq in self._places} | dict(lengths)
        kind = _SUFFIX[self._format]
        names = [re.sub(r"[^\w.+-]", "_", name) for name in self._classes]
        if len({name.lower() for name in names}) < len(names):
            names = [f"{i}_{name}" for i, name in enumerate(names)]
        paths = [Path(f"{self._prefix}.{name}.{kind}") for name in names]
        for place, path in enumerate(paths):
            if self._format == "bigwig":
                _write_bigwig(path, known, self._values(known, place))
            else:
                line = _bed_line(self._classes[place]) if self._format == "bed" else "{}\t{}\t{}\t{:.6g}\n".format
                _write_lines(path, self._values(known, place), line)
        return [*paths, self._write_labels(known)] if called else paths

    def _write_labels(self, known: Mapping[str, int]) -> Path:
        labels = Path(f"{self._prefix}.labels.bed")
        with replacing(labels) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            for seq, start, end, label, p in self._labels(known):
                colour = _COLOURS[label % len(_COLOURS)]
                name = self._classes[label].replace("\t", " ")
                file.write(f"{seq}\t{start}\t{end}\t{name}\t{round(1000 * p)}\t.\t{start}\t{end}\t{colour}\n")
        return labels

    def _values(self, lengths: Mapping[str, int], place: int) -> "Values":
        """Per sequence, starts (n,), ends (n,) and values (n,) of one class."""
        return ((seq, starts, ends, values[:, place]) for seq, starts, ends, values in self._segments(lengths))

    def _labels(self, lengths: Mapping[str, int]) -> Iterator[tuple[str, int, int, int, float]]:
        """Sequence, start, end, class and its mean probability where the most likely class is the same."""
        for seq, starts, ends, values in self._segments(lengths):
            best = values.argmax(1)
            first = np.flatnonzero(np.r_[True, (best[1:] != best[:-1]) | (starts[1:] != ends[:-1])])
            bases = ends - starts
            mean = np.add.reduceat(values.max(1) * bases, first) / np.add.reduceat(bases, first)
            last = np.r_[first[1:], len(starts)] - 1
            for a, b, label, p in zip(starts[first], ends[last], best[first], mean, strict=True):
                yield seq, a, b, label, p

    def _segments(self, lengths: Mapping[str, int]) -> Iterator[tuple[str, NDArray, NDArray, NDArray]]:
        """Per sequence, starts (n,), ends (n,) and mean probabilities (n, classes) of stretches without overlap."""
        for seq in sorted(self._places, key=str.encode):
            places = np.array(self._places[seq], dtype=np.int64).reshape(-1, 2).clip(0, lengths[seq])
            chances = np.array(self._chances[seq]).reshape(len(places), -1)
            filled = places[:, 0] < places[:, 1]
            yield seq, *means(places[filled, 0], places[filled, 1], chances[filled])


def means(starts: NDArray, ends: NDArray, values: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Starts and ends (m,) of stretches under the same of the windows (n,), and the means of their values (m, k).

    Stretches under no window are left out.
    """
    edges = np.unique(np.concatenate([starts, ends]))
    first, last = np.searchsorted(edges, starts), np.searchsorted(edges, ends)
    count = np.zeros(len(edges) + 1, dtype=np.int64)
    total = np.zeros((len(edges) + 1, values.shape[1]))
    for sign, places in ((1, first), (-1, last)):
        np.add.at(count, places, sign)
        np.add.at(total, places, sign * values)
    count, total = count.cumsum()[: len(edges)], total.cumsum(0)[: len(edges)]
    under = np.flatnonzero(count > 0)
    return edges[under], edges[np.minimum(under + 1, len(edges) - 1)], total[under] / count[under, None]


Values = Iterator[tuple[str, NDArray, NDArray, NDArray]]


def _bed_line(name: str) -> Callable[..., str]:
    name = name.replace("\t", " ")
    return lambda seq, start, end, p: f"{seq}\t{start}\t{end}\t{name}\t{round(1000 * p)}\t.\n"


def _write_lines(path: Path, segments: Values, line: Callable[..., str]) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        for seq, starts, ends, values in segments:
            file.writelines(line(seq, a, b, v) for a, b, v in zip(starts, ends, values, strict=True))


def _bigwig() -> Any:
    try:
        import pyBigWig
    except ImportError:
        raise InputError(
            "bigWig tracks need pyBigWig, which is not installed: pip install pyBigWig, or --track-format bedgraph"
        ) from None
    return pyBigWig


def _write_bigwig(path: Path, lengths: Mapping[str, int], segments: Values) -> None:
    header = sorted(lengths.items(), key=lambda item: item[0].encode())
    if header[-1:] and max(lengths.values()) >= 1 << 32:
        raise InputError(f"{path}: bigWig has no room for sequences of 2**32 bases; use --track-format bedgraph")
    with replacing(path) as temporary:
        file = _bigwig().open(str(temporary), "w")
        file.addHeader(header)
        for seq, starts, ends, values in segments:
            if len(starts):
                file.addEntries([seq] * len(starts), starts.tolist(), ends=ends.tolist(), values=values.tolist())
        file.close()
