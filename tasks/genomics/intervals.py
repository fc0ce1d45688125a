"""Intervals of sequences: read from BED, GFF3 and GTF, and from regions as samtools writes them.

Inside, coordinates are those of BED: from 0, the end excluded. GFF3, GTF and regions count from 1, the end included.
BED: three columns or more; name and strand are the fourth and sixth. Of BED12 the whole extent is taken, not the
blocks. GFF3 and GTF: each line is an interval of its own; the name is the ID (GFF3), or the transcript or gene (GTF).
Files may be compressed with gzip or BGZF. What cannot be right is an InputError with file, line and what is wrong.
"""

import gzip
import re
import zlib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.fasta import decompressed, open_bytes

_WHAT = "BED, GFF3 or GTF"
_LONGEST_LINE = 1 << 20
_GFF = (".gff", ".gff3", ".gtf", ".gff2")
_BED_STRANDS = {"+", "-", "."}
_GTF_ATTRIBUTE = re.compile(r'\s*([^\s;"]+)\s+(?:"([^"]*)"|([^\s;"]+))\s*(?:;|$)')


class Interval(NamedTuple):
    """Bases start .. end (from 0, end excluded) of a sequence."""

    seq: str
    start: int
    end: int
    name: str = ""
    strand: str = "+"
    "+, - or . (none)."
    feature: str = ""
    "What a line of GFF3 or GTF describes: gene, exon, CDS, ..."
    parent: str = ""
    "What it is part of: Parent (GFF3; several with commas between), or the transcript (GTF)."

    @property
    def region(self) -> str:
        """As samtools writes it, from 1 and the end included."""
        return f"{self.seq}:{self.start + 1}-{self.end}"


def read_intervals(path: Path | str, features: Container[str] | None = None) -> Iterator[Interval]:
    """The intervals of a BED, GFF3 or GTF file (`-`: BED from standard input), of GFF3 and GTF these features alone.

    The suffix says which it is, also before .gz or .bgz; what has none of .gff, .gff3 and .gtf is read as BED.
    """
    name = "standard input" if str(path) == "-" else str(path)
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bgz"):
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    is_gff = suffix in _GFF
    if features is not None and not is_gff:
        raise InputError(f"{name} is read as BED, which has no features; give GFF3 or GTF, or leave --feature out")
    for number, line in _lines(path, name):
        if not line or line.startswith("#"):
            if is_gff and line.startswith("##FASTA"):
                return
            continue
        where = f"{name}, line {number}"
        if is_gff:
            if line.startswith(">"):  # sequences, also without ##FASTA
                return
            interval = _gff(line, where, suffix == ".gtf")
            if features is None or interval.feature in features:
                yield interval
        elif not re.match(r"(track|browser)\b(?!\t)", line):
            yield _bed(line, where)


def parse_region(text: str, lengths: Mapping[str, int]) -> Interval:
    """The interval of chr:start-end, chr:start, chr:-end or chr: from 1, end included, with or without commas.

    A sequence whose whole name is `text` is meant first; lengths say which names there are.
    """
    seq, colon, rest = text.rpartition(":")
    if text in lengths or not colon:
        return Interval(text, 0, lengths.get(text, 0), text)
    found = re.fullmatch(r"([0-9,]*)-?([0-9,]*)", rest, re.ASCII)
    first, last = (number.replace(",", "") for number in (found.groups() if found else ("", "")))
    if not seq or not (first or last) or max(len(first), len(last)) > 18:
        raise InputError(f"region {text!r} is not chr:start-end; write it like chr1:1,000-2,000")
    start = int(first) if first else 1
    end = int(last) if last else max(start, lengths.get(seq, start))
    if start < 1:
        raise InputError(f"region {text!r} begins at {start}; positions count from 1")
    if end < start:
        raise InputError(f"region {text!r} ends before it begins; give the smaller position first")
    return Interval(seq, start - 1, end, f"{seq}:{start}-{end}")


def _lines(path: Path | str, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends."""
    with open_bytes(path, name, _WHAT) as raw:
        stream, bgzf = decompressed(raw, name, _WHAT)
        try:
            number = 0
            while line := stream.readline(_LONGEST_LINE):
                number += 1
                if b"\0" in line:
                    raise InputError(f"{name} is a binary file; give {_WHAT} as text, plain or compressed with gzip")
                if len(line) == _LONGEST_LINE:
                    raise InputError(f"{name}, line {number} has {_LONGEST_LINE} bytes or more; is it {_WHAT}?")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8", "replace").rstrip("\r\n")
            if bgzf is not None:
                bgzf.check()
        except EOFError:
            raise InputError(f"{name} is cut off (the gzip stream does not end); copy or download it again") from None
        except (zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{name} is damaged ({error}); copy or download it again") from None
        except OSError as error:
            raise InputError(f"cannot read {name}: {error.strerror or error}; check it") from None


def _bed(line: str, where: str) -> Interval:
    columns = line.split("\t") if "\t" in line else line.split()
    if len(columns) < 3:
        raise InputError(
            f"{where} has {len(columns)} columns; BED has at least chrom, start and end, with tabs between"
        )
    seq, name, strand = columns[0].strip(" "), *(columns[i].strip(" ") if len(columns) > i else "" for i in (3, 5))
    if strand not in _BED_STRANDS and strand:
        raise InputError(f"{where}: the strand {_shown(strand)} is none of +, - and .; it is the sixth column of BED")
    start, end = (_position(columns[i], what, where) for i, what in ((1, "start"), (2, "end")))
    if end < start:
        raise InputError(f"{where}: the end {end} is before the start {start}")
    return _named(Interval(seq, start, end, "" if name == "." else name, strand or "."), where)


def _gff(line: str, where: str, is_gtf: bool) -> Interval:
    columns = line.split("\t")
    if len(columns) not in (8, 9):
        raise InputError(f"{where} has {len(columns)} columns; {'GTF' if is_gtf else 'GFF3'} has 9, with tabs between")
    seq, _, feature, *_ = (column.strip(" ") for column in columns)
    strand = columns[6].strip(" ")
    if strand not in ("+", "-", ".", "?"):
        raise InputError(f"{where}: the strand {_shown(strand)} is none of +, -, . and ?; it is the seventh column")
    start, end = (_position(columns[i], what, where) for i, what in ((3, "start"), (4, "end")))
    if start < 1:
        raise InputError(f"{where}: the start is {start}; GFF3 and GTF count from 1")
    if end < start:
        raise InputError(f"{where}: the end {end} is before the start {start}")
    name, parent = _attributes(columns[8] if len(columns) == 9 else "", is_gtf)
    if not is_gtf:
        seq = unquote(seq)
    return _named(Interval(seq, start - 1, end, name, "." if strand == "?" else strand, feature, parent), where)


def _attributes(text: str, is_gtf: bool) -> tuple[str, str]:
    """What a feature is called, and what it is part of."""
    if is_gtf:
        values = {key: quoted or bare for key, quoted, bare in _GTF_ATTRIBUTE.findall(text)}
        transcript = values.get("transcript_id", "")
        return transcript or values.get("gene_id", ""), transcript
    values = dict(part.strip().split("=", 1) for part in text.split(";") if "=" in part)
    return printable(unquote(values.get("ID") or values.get("Name") or "")), values.get("Parent", "")


def _named(interval: Interval, where: str) -> Interval:
    """With a sequence that can be looked up, and a name that can be printed."""
    if not interval.seq or not interval.seq.isprintable():
        raise InputError(f"{where}: the first column, {_shown(interval.seq)}, is no name of a sequence")
    return interval._replace(name=printable(interval.name) or interval.region, feature=printable(interval.feature))


def _position(text: str, what: str, where: str) -> int:
    text = text.strip(" ")  # not of control characters, which other readers do not take for spaces
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InputError(f"{where}: the {what} {_shown(text)} is not a whole number of 0 or more")
    return int(text)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 30 else text[:30] + "...")


def printable(text: str) -> str:
    """With spaces for what would break a line or move a cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
