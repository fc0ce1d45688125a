"""`longseq dna classify` of models that label bases: a table of segments, and tracks of every base.

A segment is a run of bases whose most likely class is the same. Tracks are those of tracks.py with a value for every
base, in steps of 1/10,000, equal neighbours joined; PREFIX.labels.bed has the segments.

What is known of the bases of a record, two bytes for each class, waits in a temporary file: segments are cut from it
once it is known that the record is whole, and tracks are written from it at the end.
"""

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqmodels.errors import InputError
from seqmodels.table import Row
from seqmodels.tasks.genomics.inference import BaseClassifier, Logits, Strand, probabilities
from seqmodels.tasks.genomics.pieces import ANSWERED, Intervals, Piece, Records
from seqmodels.tasks.genomics.tracks import TrackFormat, Tracks

SHOWN = ["seq", "start", "end", "label", "prob", "status", "note"]
STEPS = 10_000
"Of probability, from 0 to 1."
_BLOCK = 1 << 20
_WAITING = 4096  # records that are read together, at most

Steps = NDArray[np.uint16]


def columns_of(classes: Sequence[str]) -> dict[str, type]:
    """Columns of the table; p_<class> are means over a segment."""
    columns: dict[str, type] = {"seq": str, "start": int, "end": int, "name": str, "length": int, "label": str}
    columns |= {"prob": float} | {f"p_{name}": float for name in classes}
    return columns | {"status": str, "note": str, "reading": str, "file": str, "model": str}


class Kept(NamedTuple):
    """Where the probabilities of a piece are kept, in the direction in which it was read."""

    first: int
    "Its first base in the file."
    bases: int
    turned: bool
    "Whether it was read as reverse complement."


class Kepts:
    """Probabilities of bases in a temporary file, which is there until the `with` block ends."""

    def __init__(self, classifier: BaseClassifier, folder: Path | None) -> None:
        self.classes = classifier.classes
        self._complement = classifier.complement
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __enter__(self) -> "Kepts":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    @property
    def end(self) -> int:
        """Bases in the file."""
        return self._file.seek(0, 2) // (2 * len(self.classes))

    def keep(self, logits: Logits) -> None:
        """Appends logits (l, classes)."""
        self._file.write(np.rint(STEPS * probabilities(logits)).astype("<u2").tobytes())

    def cut(self, end: int) -> None:
        """Forgets all bases from `end` on."""
        self._file.truncate(2 * len(self.classes) * end)

    def read(self, kept: Kept, start: int, end: int) -> Steps:
        """Probabilities (end - start, classes) in STEPS of bases of a piece, counted as its sequence does."""
        if kept.turned:
            start, end = kept.bases - end, kept.bases - start
        self._file.seek(2 * len(self.classes) * (kept.first + start))
        values = np.frombuffer(self._file.read(2 * len(self.classes) * (end - start)), dtype="<u2")
        values = values.reshape(-1, len(self.classes))
        return values[::-1, self._complement] if kept.turned else values

    def segments(self, kept: Kept, start: int, end: int) -> Iterator[tuple[int, int, int, NDArray[np.float64]]]:
        """Start, end, class and mean probabilities (classes,) of the segments of bases start .. end of a piece."""
        label, begun, sums = -1, start, np.zeros(len(self.classes), dtype=np.int64)
        for at in range(start, end, _BLOCK):
            values = self.read(kept, at, min(at + _BLOCK, end)).astype(np.int64)
            best = values.argmax(1)
            firsts = np.append(0, np.flatnonzero(best[1:] != best[:-1]) + 1)
            for first, total in zip(firsts.tolist(), np.add.reduceat(values, firsts), strict=True):
                if best[first] != label and label >= 0:
                    yield begun, at + first, label, sums / (STEPS * (at + first - begun))
                    begun, sums = at + first, np.zeros_like(sums)
                label, sums = int(best[first]), sums + total
        if label >= 0:
            yield begun, end, label, sums / (STEPS * (end - begun))


class BaseTracks(Tracks):
    """Tracks of every base; one that several intervals have is taken from the one that begins first."""

    def __init__(self, prefix: Path, format: TrackFormat, kepts: Kepts) -> None:
        super().__init__(prefix, format)
        self._classes, self._kepts = kepts.classes, kepts
        self._pieces: dict[str, list[tuple[int, Kept]]] = {}

    def take(self, row: Row, kept: Kept) -> bool:
        """Whether a piece is taken; of sequences with the same name the first alone."""
        seq = row["seq"]
        if row["status"] == "duplicate" or self._files.setdefault(seq, row["file"]) != row["file"]:
            return False
        self._ends[seq] = max(self._ends.get(seq, 0), row["end"])
        self._places.setdefault(seq, array("q")).extend((row["start"], row["end"]))
        self._pieces.setdefault(seq, []).append((row["start"], kept))
        return True

    def add(self, rows: list[Row], classes: tuple[str, ...], prefix: str = "p_") -> None:
        """Nothing: what `take` has taken is all there is."""

    def _stretches(self, lengths: Mapping[str, int]) -> Iterator[tuple[str, int, Kept, int, int]]:
        """Sequence, start of a piece in it, the piece, and which of its bases are to be shown; without overlaps."""
        for seq in sorted(self._pieces, key=str.encode):
            reached = 0
            for start, kept in sorted(self._pieces[seq]):
                first, end = max(start, reached), min(start + kept.bases, lengths[seq])
                if first < end:
                    yield seq, start, kept, first - start, end - start
                    reached = end

    def _values(self, lengths: Mapping[str, int], place: int) -> Iterator[tuple[str, NDArray, NDArray, NDArray]]:
        for seq, start, kept, first, end in self._stretches(lengths):
            for at in range(first, end, _BLOCK):
                values = self._kepts.read(kept, at, min(at + _BLOCK, end))[:, place]
                edges = np.flatnonzero(np.diff(values)) + 1
                starts = np.append(0, edges)
                yield seq, start + at + starts, start + at + np.append(edges, len(values)), values[starts] / STEPS

    def _labels(self, lengths: Mapping[str, int]) -> Iterator[tuple[str, int, int, int, float]]:
        for seq, start, kept, first, end in self._stretches(lengths):
            for a, b, label, means in self._kepts.segments(kept, first, end):
                yield seq, start + a, start + b, label, float(means[label])


def segmented(
    sources: Sequence[Records | Intervals],
    classifier: BaseClassifier,
    strand: Strand,
    kepts: Kepts,
    tracks: BaseTracks | None,
    problems: list[list[str]],
) -> Iterator[tuple[int, list[Row]]]:
    """The segments of each record or interval of all sources in order, with the place of the source."""
    for place, source in enumerate(sources):
        try:
            for piece, reading, parts in _answered(source, classifier, strand):
                first = kepts.end
                for logits in parts or ():
                    kepts.keep(logits)
                for _ in piece.rest or ():  # complete the counts
                    pass
                row = _placed(piece, classifier.name) | {"reading": reading}
                if parts is None and row["status"] in ANSWERED:
                    row |= {"status": "too_long", "note": reading}
                kept = Kept(first, kepts.end - first, row.get("strand") == "-")
                rows = [row | {"reading": ""}]
                if answered := row["status"] in ANSWERED:
                    rows = [_row(row, classifier.classes, *found) for found in kepts.segments(kept, 0, kept.bases)]
                yield place, rows
                if not (answered and tracks is not None and tracks.take(row, kept)):
                    kepts.cut(first)
        except InputError as error:
            problems[place].append(str(error))


def _placed(piece: Piece, model: str) -> Row:
    """The columns of a piece that need no model, with its place; of a whole record that is from its first base."""
    row = piece.describe()
    if "seq" not in row:
        row |= {"seq": row["record_id"], "name": row["record_id"], "start": 0, "end": row["length"]}
    return row | {"model": model}


def _row(row: Row, classes: Sequence[str], start: int, end: int, label: int, means: NDArray[np.float64]) -> Row:
    place: Row = {"start": row["start"] + start, "end": row["start"] + end, "length": end - start}
    scores = {f"p_{name}": float(mean) for name, mean in zip(classes, means, strict=True)}
    return row | place | {"label": classes[label], "prob": float(means[label])} | scores


def _answered(
    source: Records | Intervals, classifier: BaseClassifier, strand: Strand
) -> Iterator[tuple[Piece, str, Iterable[Logits] | None]]:
    """The pieces of a source in order, how each is read, and the logits (c, classes) of its bases, in stretches.

    Of one that cannot be read, why, and None.
    """
    waiting: list[Piece] = []
    held = 0

    def flush() -> Iterator[tuple[Piece, str, Iterable[Logits]]]:
        nonlocal held
        fine = [piece.describe()["status"] in ANSWERED for piece in waiting]
        found = iter(
            classifier.on_strands([piece.tokens for piece, ok in zip(waiting, fine, strict=True) if ok], strand)
        )
        for piece, ok in zip(waiting, fine, strict=True):
            yield piece, "whole", [next(found)] if ok else []
        held = 0
        waiting.clear()

    try:
        for piece in source.pieces(classifier.longest_batched):
            if piece.rest is None:
                waiting.append(piece)
                held += len(piece.tokens)
                if held >= 8 * classifier.batch_tokens or len(waiting) >= _WAITING:
                    yield from flush()
                continue
            yield from flush()
            parts, reading = classifier.read(piece.rest, strand)
            yield piece, reading, parts
    except InputError:
        yield from flush()  # what was read before the problem
        raise
    yield from flush()
