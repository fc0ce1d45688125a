"""Labels per base, from annotation in GFF3, GTF and BED.

    labels = label_bases([Path("genes.gff3")], ("CDS", "exon", "intron"), {"chr1": 248_956_422, ...})
    labels.of("chr1", 1000, 2000)                # class ids (1000,), IGNORED where nothing is known

Features are the third column of GFF3 and GTF. All intervals of a BED file are of the one feature that is asked for; of
several, the fourth column says which. A base of several features has the one that is named first; a base of none is
`background`. Class ids follow the sorted names.

Introns are the lines `intron` that name a transcript; where a file has none, the gaps between the exons of each
transcript (of its CDS lines if it has no exons); and where it names no transcripts at all, all lines `intron`.

Stranded, a feature makes two classes, feature+ and feature-. A base with the same feature on both strands, or with one
whose strand is not said, is then not known.

Not known are also sequences that no line mentions, and what lies outside of the intervals `within`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqmodels.errors import InputError
from seqmodels.heads import IGNORED
from seqmodels.tasks.genomics.intervals import Interval, read_intervals

BACKGROUND = "background"
_PLUS, _MINUS = 1, 2
_STRANDS = {"+": _PLUS, "-": _MINUS, ".": _PLUS | _MINUS}


class Runs(NamedTuple):
    """The labels of a sequence as runs of the same one."""

    ends: NDArray[np.int64]
    "(n,) base after the last of each run."
    values: NDArray[np.int64]
    "(n,) label of each run."


class BaseLabels:
    """The class of each base of some sequences."""

    def __init__(
        self, classes: tuple[str, ...], complement: tuple[int, ...], runs: Mapping[str, Runs], notes: Sequence[str] = ()
    ) -> None:
        self.classes, self.complement, self.notes = classes, complement, tuple(notes)
        self._runs = runs
        self._turned = np.array(complement or range(len(classes)), dtype=np.int64)

    def of(self, seq: str, start: int, end: int) -> NDArray[np.int64]:
        """Class ids (end - start,) of bases of a sequence, IGNORED where they are not known."""
        if seq not in self._runs:
            return np.full(end - start, IGNORED, dtype=np.int64)
        ends, values = self._runs[seq]
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, end)
        lengths = np.diff(np.minimum(ends[first : last + 1], end), prepend=start)
        return np.repeat(values[first : last + 1], lengths)

    def turned(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels (..., l) of the same bases as the reverse complement has them."""
        labels = labels[..., ::-1]
        return np.where(labels == IGNORED, IGNORED, self._turned[labels.clip(min=0)])


def label_bases(
    files: Sequence[Path],
    features: Sequence[str],
    lengths: Mapping[str, int],
    *,
    stranded: bool = False,
    within: Path | None = None,
) -> BaseLabels:
    """The labels of sequences of these lengths; what is wrong with a file is an InputError."""
    if not features or BACKGROUND in features or len(set(features)) < len(features):
        raise InputError(f"features are {','.join(features)!r}; name some, each once, like CDS,exon,intron")
    places: dict[str, list[list[tuple[int, int, int]]]] = {}  # of a sequence, for each feature: start, end, strand
    found, others = set[str](), set[str]()
    for path in files:
        for interval in _featured(path, features):
            if interval.seq not in lengths:
                others.add(interval.seq)
                continue
            own = places.setdefault(interval.seq, [[] for _ in features])
            found.add(interval.feature)
            if interval.feature in features:  # others only tell that the sequence is annotated
                _check_inside(interval, lengths[interval.seq], path)
                place = features.index(interval.feature)
                own[place].append((interval.start, interval.end, _STRANDS[interval.strand]))
    names = " and ".join(map(str, files))
    if not places:
        few = f"{', '.join(sorted(others)[:3])}; the FASTA has {', '.join(list(lengths)[:3])}"
        raise InputError(f"{names} annotates none of the sequences, but {few}: give files that go together")
    if missing := [feature for feature in features if feature not in found]:
        there = ", ".join(sorted(found - set(features))[:10])
        raise InputError(
            f"{names} has no {' and no '.join(missing)} in these sequences{there and f', but {there}'}; name what it "
            "has with --features"
        )
    inside = None if within is None else _inside(within, lengths)
    suffixes = ("+", "-") if stranded else ("",)
    classes = tuple(sorted([BACKGROUND, *(f"{feature}{s}" for feature in features for s in suffixes)]))
    ids = {name: i for i, name in enumerate(classes)}
    complement = tuple(ids[name[:-1] + {"+": "-", "-": "+"}[name[-1]]] if name != BACKGROUND else i
                       for i, name in enumerate(classes)) if stranded else ()  # fmt: skip
    tables = []
    for feature in features:  # label by strands
        plus, minus = (ids[f"{feature}{s}"] for s in (suffixes * 2)[:2])
        tables.append(np.array([IGNORED, plus, minus, IGNORED if stranded else plus], dtype=np.int16))
    runs = {
        seq: _painted(own, tables, ids[BACKGROUND], lengths[seq], None if inside is None else inside.get(seq, []))
        for seq, own in places.items()
    }
    notes = []
    if unknown := [seq for seq in lengths if seq not in places]:
        notes.append(f"{len(unknown)} sequences have no annotation and no labels ({', '.join(unknown[:3])})")
    if others:
        notes.append(f"{len(others)} annotated sequences are not in the FASTA ({', '.join(sorted(others)[:3])})")
    return BaseLabels(classes, complement, runs, notes)


def _featured(path: Path, features: Sequence[str]) -> Iterator[Interval]:
    """The intervals of a file with the feature that each is of, introns included."""
    introns, parts = list[Interval](), dict[str, dict[tuple[str, str, str], list[Interval]]]()
    for interval in read_intervals(path):
        if not interval.feature:  # BED
            interval = interval._replace(feature=features[0] if len(features) == 1 else interval.name)
        if "intron" not in features:
            yield interval
        elif interval.feature == "intron":
            introns.append(interval)
        else:
            yield interval
            if interval.feature in ("exon", "CDS"):
                for parent in filter(None, interval.parent.split(",")):
                    transcript = interval.seq, parent, interval.strand
                    parts.setdefault(interval.feature, {}).setdefault(transcript, []).append(interval)
    if "intron" in features:
        transcripts = parts.get("CDS", {}) | parts.get("exon", {})
        said = [intron for intron in introns if intron.parent]
        yield from said or (_gaps(transcripts.values()) if transcripts else introns)


def _gaps(transcripts: Iterable[list[Interval]]) -> Iterator[Interval]:
    """What lies between the parts of each transcript."""
    for parts in transcripts:
        parts.sort(key=lambda part: part.start)
        end = parts[0].end
        for part in parts[1:]:
            if part.start > end:
                yield part._replace(start=end, end=part.start, feature="intron")
            end = max(end, part.end)


def _painted(
    places: list[list[tuple[int, int, int]]],
    tables: list[NDArray[np.int16]],
    background: int,
    length: int,
    inside: list[tuple[int, int]] | None,
) -> Runs:
    """Labels of one sequence: features (start, end, strand) painted over each other, the first one last."""
    labels = np.full(length, background, dtype=np.int16)
    strands = np.zeros(length, dtype=np.uint8)
    for own, table in zip(reversed(places), reversed(tables), strict=True):
        strands[:] = 0
        for start, end, strand in own:
            strands[start:end] |= strand
        np.copyto(labels, table[strands], where=strands > 0)
    if inside is not None:
        known = np.zeros(length, dtype=bool)
        for start, end in inside:
            known[start:end] = True
        labels[~known] = IGNORED
    ends = np.append(np.flatnonzero(labels[1:] != labels[:-1]) + 1, length)
    return Runs(ends, labels[ends - 1].astype(np.int64))


def _inside(path: Path, lengths: Mapping[str, int]) -> dict[str, list[tuple[int, int]]]:
    """The intervals of a file by sequence."""
    found: dict[str, list[tuple[int, int]]] = {}
    for interval in read_intervals(path):
        if interval.seq in lengths:
            _check_inside(interval, lengths[interval.seq], path)
            found.setdefault(interval.seq, []).append((interval.start, interval.end))
    if not found:
        raise InputError(f"{path} has no interval of {', '.join(list(lengths)[:3])}; give files that go together")
    return found


def _check_inside(interval: Interval, length: int, path: Path) -> None:
    if interval.end > length:
        raise InputError(
            f"{path}: {interval.name} ends at {interval.end}, beyond {interval.seq} of {length} bases; give the "
            "annotation of this assembly, or cut what reaches over the end of a circular sequence"
        )
