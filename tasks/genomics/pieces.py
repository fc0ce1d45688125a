"""What a classifier is asked about, one after the other: records of FASTA files, intervals of genomes, windows of both.

    for piece in Records("genome.fa").pieces(longest=65536): ...          # whole records
    for piece in Intervals([IndexedFasta("genome.fa")], intervals, "x.bed", Cut(1000, 500)).pieces(longest=65536): ...

Windows begin every `stride` bases of a record or interval, in the direction in which it is read. One that would reach
beyond the end is moved back to end there, so that all have their length, but where there are fewer bases in all.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seqmodels.errors import InputError
from seqmodels.table import Row
from seqmodels.tasks.genomics.fasta import FastaReader, Record
from seqmodels.tasks.genomics.indexed import IndexedFasta
from seqmodels.tasks.genomics.intervals import Interval, parse_region, printable, read_intervals
from seqmodels.tasks.genomics.tokens import Counts, Tokens, count, encode_marked, reverse_complement, tokens_of

ANSWERED = ("ok", "duplicate")
"Statuses of what is classified."
_NOTHING = np.zeros(0, dtype=np.uint8)


class Cut(NamedTuple):
    """Windows of `window` bases, one every `stride`."""

    window: int
    stride: int


class Piece(NamedTuple):
    """What is asked about at a time."""

    describe: Callable[[], Row]
    "The columns of its row that need no model; call it once `rest` is used up."
    tokens: Tokens = np.zeros(0, dtype=np.uint8)
    "All of it (l,), unless there is `rest`."
    rest: Iterator[Tokens] | None = None
    "What is longer than the longest that goes through the model at once, in chunks."


class Records:
    """The records of a FASTA file (`-`: standard input), whole or in windows."""

    def __init__(self, path: Path | str, cut: Cut | None = None) -> None:
        self._path, self._cut, self.name = path, cut, FastaReader(path).name
        self.lengths: dict[str, int] = {}  # not known before the end

    def pieces(self, longest: int) -> Iterator[Piece]:
        """In the order of the file; an InputError for what is damaged comes last."""
        names: set[str] = set()
        for record in FastaReader(self._path):
            common: Row = {"file": printable(self.name)}
            again = record.number if record.name in names else 0
            names.add(record.name)
            if self._cut is None:
                common |= {"record_id": record.name, "description": record.description}
                yield _whole(record, longest, partial(_row, common, record, record.counts, again=again))
            else:
                place = Interval(record.name, 0, 0, record.name)
                yield from _windows(record, place, None, self._cut, longest, common, again)


class Intervals:
    """Intervals of the sequences of some FASTA files; one on the minus strand is read as its reverse complement."""

    def __init__(
        self, genomes: list[IndexedFasta], intervals: list[Interval], name: str, cut: Cut | None = None
    ) -> None:
        self.intervals, self._cut, self.name = intervals, cut, name
        self._homes: dict[str, IndexedFasta] = {}
        self.lengths: dict[str, int] = {}
        "Bases of each sequence of the files."
        asked = {interval.seq for interval in intervals}
        for genome in genomes:
            for seq in sorted(asked & self._homes.keys() & genome.lengths.keys()):
                raise InputError(
                    f"{self._homes[seq].name} and {genome.name} both have a sequence {seq}, of which {name} has "
                    "intervals; give one file at a time"
                )
            self._homes |= dict.fromkeys(genome.lengths, genome)
            self.lengths |= genome.lengths

    def pieces(self, longest: int) -> Iterator[Piece]:
        """In the order of the intervals."""
        for number, interval in enumerate(self.intervals, 1):
            length, home = self.lengths.get(interval.seq), self._homes.get(interval.seq)
            record = Record(interval.name, "", number)
            common: Row = {"file": "" if home is None else printable(home.name)}
            if home is None or length is None or interval.start >= max(length, 1) or interval.end < 0:
                common |= _located(interval, None)
                yield Piece(partial(dict, _row(common, record, Counts()) | self._nowhere(interval.seq)))
                continue
            record.marked = _marked(home, interval, record.counts)
            if self._cut is None:
                common |= _located(interval, length)
                yield _whole(record, longest, partial(_row, common, record, record.counts, seq=interval.seq))
            else:
                yield from _windows(record, interval, length, self._cut, longest, common)

    def widened(self, context: int | None) -> "Intervals":
        """The same with so many more bases on each side (N beyond the ends of a sequence); None: its whole sequence."""
        wide = copy.copy(self)
        wide.intervals = []
        for interval in self.intervals:
            if context is None:
                start, end = 0, max(interval.end, self.lengths.get(interval.seq, 0))
            else:
                start, end = interval.start - context, interval.end + context
            wide.intervals.append(interval._replace(start=start, end=end))
        return wide

    def _nowhere(self, seq: str) -> Row:
        """Status and note of an interval that has no bases."""
        if seq in self.lengths:
            return {"status": "outside", "note": f"{seq} has {self.lengths[seq]} bases"}
        known = ", ".join(itertools.islice(self.lengths, 3)) + ", ..." * (len(self.lengths) > 3)
        return {"status": "missing", "note": f"no sequence {seq} in the FASTA, which has {known}"}


def sources_of(
    files: list[Path],
    region: list[str] | None,
    bed: Path | None,
    feature: list[str] | None,
    cut: Cut | None = None,
) -> Sequence[Records | Intervals]:
    """The records of FASTA files, or of these the regions (as samtools writes them) and the intervals of a file.

    Intervals are read, and their genomes opened, at once.
    """
    if region is None and bed is None:
        if feature is not None:
            raise InputError("--feature is for the lines of a GFF3 or GTF file; give --bed too")
        return [Records(path, cut) for path in files]
    if not files:
        raise InputError("no FASTA file was given; name the one that has the sequences of the intervals")
    intervals = [] if bed is None else list(read_intervals(bed, feature))
    if bed is not None and not intervals:
        raise InputError(f"{bed} has no intervals{' of these features' if feature else ''}; give one that has")
    genomes = [IndexedFasta(path) for path in files]
    lengths = {seq: length for genome in genomes for seq, length in genome.lengths.items()}
    intervals += [parse_region(text, lengths) for text in region or ()]
    return [Intervals(genomes, intervals, " and ".join(map(str, ([bed] if bed else []) + (region or [])[:3])), cut)]


def sliding(
    chunks: Iterable[Tokens], cut: Cut, is_whole: Callable[[], bool] = lambda: True
) -> Iterator[tuple[int, Tokens]]:
    """Start and tokens of windows over a sequence that comes in chunks; the last is moved back to end where that does.

    There is no such last one if the sequence turns out not to be whole.
    """
    window, stride = cut
    held, parts = _NOTHING, []
    at = total = start = reached = 0  # of what is held; of what has come; of the next window; end of the last one
    for chunk in chunks:
        parts.append(chunk)
        total += len(chunk)
        if total < start + window:
            continue
        held, parts = np.concatenate([held, *parts]), []
        while total >= start + window:
            yield start, held[start - at : start - at + window]
            reached, start = start + window, start + stride
        keep = max(at, min(start, total - window))
        held, at = held[keep - at :], keep
    if reached < total and start < total and is_whole():
        last = max(0, total - window)
        yield last, np.concatenate([held, *parts])[last - at :]


def _marked(genome: IndexedFasta, interval: Interval, counts: Counts) -> Iterator[Tokens]:
    """Marked tokens of an interval in its own direction, up to the block that has a character that is no base."""
    minus = interval.strand == "-"
    at = interval.end if minus else interval.start
    for block in genome.blocks(interval.seq, interval.start, interval.end, backwards=minus):
        at -= len(block) * minus
        before = counts.length
        marked = encode_marked(block, counts)
        if counts.invalid:
            counts.invalid = (at + counts.invalid[0] - before, counts.invalid[1])
            if minus:
                counts.length = before
            else:
                yield marked
            return
        at += len(block) * (not minus)
        yield reverse_complement(marked) if minus else marked


def _whole(record: Record, longest: int, describe: Callable[[], Row]) -> Piece:
    """A record as one piece."""
    parts: list[Tokens] = []
    held = 0
    chunks = record.chunks()
    for chunk in chunks:
        parts.append(chunk)
        held += len(chunk)
        if held > longest:
            return Piece(describe, _NOTHING, itertools.chain(parts, chunks))
    return Piece(describe, np.concatenate(parts) if parts else _NOTHING)


def _windows(
    record: Record, place: Interval, length: int | None, cut: Cut, longest: int, common: Row, again: int = 0
) -> Iterator[Piece]:
    """The windows of a record that lies at `place`, in a sequence of `length` bases if that is known.

    What ends them before the end of the record, or that there are none, gets a row of its own.
    """

    def located(start: int, bases: int) -> Row:
        begin = place.end - start - bases if place.strand == "-" else place.start + start
        return common | _located(place._replace(start=begin, end=begin + bases), length)

    def is_whole() -> bool:
        return not (record.truncated or record.counts.invalid)

    number = 0
    for start, marked in sliding(record.marked, cut, is_whole):
        number += 1
        counts = Counts()
        count(marked, counts)
        tokens = tokens_of(marked)
        describe = partial(_row, located(start, len(tokens)), None, counts, again=again)
        yield Piece(describe, _NOTHING, iter([tokens])) if len(tokens) > longest else Piece(describe, tokens)
    if not number or not is_whole():
        bases = record.counts.length if length is None else place.end - place.start
        rest = max(0, bases - number * cut.stride)
        row = _row(located(bases - rest, rest), record, record.counts, seq=place.seq)
        yield Piece(partial(dict, row | {"length": rest, "n_frac": None, "softmask_frac": None}))


def _located(place: Interval, length: int | None) -> Row:
    """Where a piece lies, and how many of its bases are beyond the ends of a sequence of `length` bases, if known."""
    row: Row = {"seq": place.seq, "start": place.start, "end": place.end, "name": place.name, "strand": place.strand}
    inside = place.end - place.start
    if length is not None:
        inside = max(0, min(place.end, length) - max(place.start, 0))
    return row | {"padded": place.end - place.start - inside}


def _row(common: Row, record: Record | None, counts: Counts, again: int = 0, seq: str = "") -> Row:
    """A row of what has been read, with its status; `again`: the number of a record whose name occurred before."""
    row = common | {"length": counts.length, "ambiguous": counts.ambiguous, "status": "ok", "note": ""}
    row |= {"n_frac": None, "softmask_frac": None}
    if counts.length:
        row |= {"n_frac": counts.unknown / counts.length, "softmask_frac": counts.soft_masked / counts.length}
    if record is not None and record.truncated:
        row |= {"status": "truncated", "note": f"the file breaks off after {counts.length} bases of this record"}
    elif counts.invalid:
        position, character = counts.invalid
        row |= {"status": "invalid", "note": f"{character!r} at position {position}{seq and f' of {seq}'} is no base"}
    elif not counts.length:
        row |= {"status": "empty", "note": "no bases"}
    elif counts.unknown == counts.length:
        row |= {"status": "only_n", "note": "no A, C, G or T"}
    elif again:
        row |= {"status": "duplicate", "note": f"record {again} has the name of an earlier one"}
    if (padded := common.get("padded")) and row["status"] == "ok":
        row["note"] = f"{padded} of {counts.length} bases lie beyond the end of {common['seq']} and are read as N"
    return row
