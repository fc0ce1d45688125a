"""`longseq dna classify` of models that label bases: a table of segments, and tracks of every base.

A segment is a run of bases whose most likely class is the same. Tracks are those of tracks.py with a value for every
base, in steps of 1/10,000, equal neighbours joined; PREFIX.labels.bed has the segments.

What is known of the bases of a record, two bytes for each class, waits in a temporary file: segments are cut from it
once it is known that the record is whole, and tracks are written from it at the end.

Records may be read by several processes; what these say of one comes back at once, and must fit into memory.
"""

import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqmodels.errors import InputError
from seqmodels.table import Row
from seqmodels.tasks.genomics.inference import Alone, BaseClassifier, Facts, Logits, Strand, Together, probabilities
from seqmodels.tasks.genomics.pieces import ANSWERED, Intervals, Piece, Records
from seqmodels.tasks.genomics.tokens import Tokens
from seqmodels.tasks.genomics.tracks import TrackFormat, Tracks
from seqmodels.workers import LostWorker, in_order

IDENTITY = ["file", "seq", "start", "end", "name", "model"]
"Columns: a row with these is the same row when work is resumed."
SHOWN = ["seq", "start", "end", "label", "prob", "status", "note"]
STEPS = 10_000
"Of probability, from 0 to 1."
_BLOCK = 1 << 20
_WAITING = 4096  # records that are read together, at most
_AHEAD = 1 << 30  # bases, of 2 bytes per class, that wait at most for those before them

Steps = NDArray[np.uint16]


def columns_of(classes: Sequence[str]) -> dict[str, type]:
    """Columns of the table; p_<class> are means over a segment."""
    columns: dict[str, type] = {"seq": str, "start": int, "end": int, "name": str, "length": int, "label": str}
    columns |= {"prob": float} | {f"p_{name}": float for name in classes}
    return columns | {"status": str, "note": str, "reading": str, "file": str, "model": str}


def steps_of(logits: Logits) -> Steps:
    """Probabilities in STEPS."""
    return np.rint(STEPS * probabilities(logits)).astype("<u2")


class BaseReader:
    """A BaseClassifier that reads a strand; its answers are probabilities (l, classes) in STEPS."""

    def __init__(self, strand: Strand, **options: Any) -> None:
        self._classifier, self._strand = BaseClassifier(**options), strand
        self.facts = self._classifier.facts

    def batch(self, sequences: list[Tokens]) -> list[Steps]:
        """Of each of some whole sequences."""
        return [steps_of(logits) for logits in self._classifier.on_strands(sequences, self._strand)]

    forward = batch

    def stream(self, chunks: Iterable[Tokens]) -> Iterator[tuple[str, Steps | None]]:
        """Of one sequence that comes in chunks, stretch by stretch, with how it is read; or why it cannot be, and None.

        The chunks are taken as the stretches are.
        """
        parts, reading = self._classifier.read(chunks, self._strand)
        if parts is None:
            yield reading, None
        for logits in parts or ():
            yield reading, steps_of(logits)


class Kept(NamedTuple):
    """Where the probabilities of a piece are kept, in the direction in which it was read."""

    first: int
    "Its first base in the file."
    bases: int
    turned: bool
    "Whether it was read as reverse complement."


class Kepts:
    """Probabilities of bases in a temporary file, which is there until the `with` block ends."""

    def __init__(self, facts: Facts, folder: Path | None) -> None:
        self.classes = facts.classes
        self._complement = list(facts.complement)
        self._file: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __enter__(self) -> "Kepts":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    @property
    def end(self) -> int:
        """Bases in the file."""
        return self._file.seek(0, 2) // (2 * len(self.classes))

    def keep(self, values: Steps) -> None:
        """Appends probabilities (l, classes) in STEPS."""
        self._file.write(values.tobytes())

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


class Before:
    """The rows of a table that is resumed, piece by piece."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._next = next(rows, None)

    def of(self, place: Row, end: int | None) -> list[Row] | None:
        """The rows of the next piece, which lies at a place and ends there, if that is known; None if some are missing.

        Where the end is not known, that all are there is known from the row that follows.
        """
        rows, at, known = list[Row](), place["start"], end is not None
        while (row := self._next) is not None and all(
            row[name] == value for name, value in (place | {"start": at}).items()
        ):
            rows.append(row)
            at, self._next = row["end"], next(self._rows, None)
            if at == end or not row["label"]:
                return rows
        if rows and not known and self._next is not None:
            return rows
        self._next = None  # nor are those of the pieces that follow
        return None


class _Group(NamedTuple):
    """Pieces that follow each other in one source, and what is still to come for some of them."""

    pieces: list[Piece]
    known: list[list[Row]] | None
    "The rows of each, where all are kept."
    answers: list[tuple[list[int], Future]]
    "Places of pieces, and their probabilities; or of a long one what BaseReader.stream gives."

    def done(self) -> bool:
        """Whether all answers are there."""
        return all(future.done() for _, future in self.answers)

    def found(self) -> dict[int, Iterable[tuple[str, Steps | None]]]:
        """For each place what BaseReader.stream gives; waits for it."""
        if len(self.pieces) == 1 and self.pieces[0].rest is not None:
            return {place: future.result() for (place,), future in self.answers}
        answers = ((places, future.result()) for places, future in self.answers)
        return {i: [("whole", steps)] for places, found in answers for i, steps in zip(places, found, strict=True)}


def segmented(
    sources: Sequence[Records | Intervals],
    engine: Alone | Together,
    kepts: Kepts,
    tracks: BaseTracks | None,
    before: Before,
    problems: list[list[str]],
) -> Iterator[tuple[int, list[Row]]]:
    """The segments of each record or interval of all sources in order, with the place of the source."""
    broken = set[int]()

    def asked() -> Iterator[tuple[int, _Group]]:
        for place, source in enumerate(sources):
            groups = _asked(source, engine, before)
            try:
                while place not in broken and (group := next(groups, None)) is not None:
                    yield place, group
            except LostWorker:
                raise
            except InputError as error:
                problems[place].append(str(error))

    for place, group in in_order(asked(), lambda one: one[1].done(), lambda one: _bases(one[1]), _AHEAD):
        try:
            for rows in _finished(group, engine.facts, kepts, tracks):
                yield place, rows
        except LostWorker:
            raise
        except InputError as error:  # of what is read only now
            problems[place].append(str(error))
            broken.add(place)


def _bases(group: _Group) -> int:
    return sum(piece.describe()["length"] for piece in group.pieces)


def _finished(group: _Group, facts: Facts, kepts: Kepts, tracks: BaseTracks | None) -> Iterator[list[Row]]:
    """The rows of each piece of a group."""
    found = group.found()
    for i, piece in enumerate(group.pieces):
        first, reading, failed = kepts.end, "", False
        for how, steps in found.get(i, ()):
            reading, failed = how, steps is None
            if steps is not None:
                kepts.keep(steps)
        for _ in piece.rest or ():  # complete the counts
            pass
        row = _placed(piece, facts.name) | {"reading": reading}
        if group.known is not None:
            rows = [old | {name: row[name] for name in ("file", "seq", "name", "model")} for old in group.known[i]]
            rows[-1]["end"] = row["end"]  # what does not fit is told by the table
            yield rows
            continue
        if failed and row["status"] in ANSWERED:
            row |= {"status": "too_long", "note": reading}
        kept = Kept(first, kepts.end - first, row.get("strand") == "-")
        rows = [row | {"reading": ""}]
        if answered := row["status"] in ANSWERED:
            rows = [_row(row, facts.classes, *segment) for segment in kepts.segments(kept, 0, kept.bases)]
        yield rows
        if not (answered and tracks is not None and tracks.take(row, kept)):
            kepts.cut(first)


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


def _asked(source: Records | Intervals, engine: Alone | Together, before: Before) -> Iterator[_Group]:
    """The pieces of a source in order, asked about in groups; of a group whose rows are all kept nothing is asked."""
    waiting: list[Piece] = []
    held = 0

    def known(pieces: list[Piece]) -> list[list[Row]] | None:
        rows = [_before(before, piece) for piece in pieces]
        return None if None in rows else rows  # pyright: ignore

    def flush() -> _Group:
        nonlocal held
        pieces, held = waiting.copy(), 0
        waiting.clear()
        if (rows := known(pieces)) is not None:
            return _Group(pieces, rows, [])
        fine = [i for i, piece in enumerate(pieces) if piece.describe()["status"] in ANSWERED]
        batches = engine.batch([pieces[i].tokens for i in fine]) if fine else []
        return _Group(pieces, None, [([fine[i] for i in places], future) for places, future in batches])

    try:
        for piece in source.pieces(engine.facts.longest_batched):
            if piece.rest is None:
                waiting.append(piece)
                held += len(piece.tokens)
                if held >= 8 * engine.facts.batch_tokens or len(waiting) >= _WAITING:
                    yield flush()
                continue
            if waiting:
                yield flush()
            if (rows := known([piece])) is None:
                yield _Group([piece], None, [([0], engine.stream(piece.rest))])
                continue
            for _ in piece.rest:
                pass
            yield _Group([piece], rows, [])
    except LostWorker:
        raise
    except InputError:
        if waiting:
            yield flush()  # what was read before the problem
        raise
    if waiting:
        yield flush()


def _before(before: Before, piece: Piece) -> list[Row] | None:
    """The rows of a piece that are kept, if all of them are."""
    row = _placed(piece, "")
    end = None if piece.rest is not None and "record_id" in row else row["end"]  # a record's length comes last
    return before.of({name: row[name] for name in ("file", "seq", "name", "start")}, end)
