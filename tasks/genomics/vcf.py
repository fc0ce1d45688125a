"""Variants in VCF: read line by line as text, alleles checked against a genome and normalised, and written back.

Nothing of a line is lost: what is written is the line as it was read, with more in its INFO. Positions are counted
from 1 where they are VCF's, and from 0 inside of the package.
"""

import gzip
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from seqmodels.errors import InputError
from seqmodels.files import replacing
from seqmodels.tasks.genomics.fasta import decompressed, open_bytes
from seqmodels.tasks.genomics.genome import Genome
from seqmodels.tasks.genomics.tokens import A, T, decode, encode

COLUMNS = ("CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")
_LETTERS = frozenset("ACGTNacgtn")


@dataclass(frozen=True)
class Line:
    """One data line, with what is wrong with it."""

    number: int
    "Line of the file, from 1."
    fields: tuple[str, ...]
    problem: str = ""

    def field(self, name: str) -> str:
        """A fixed column's text; '.' where the line is too short."""
        place = COLUMNS.index(name)
        return self.fields[place] if place < len(self.fields) else "."

    @property
    def alternatives(self) -> tuple[str, ...]:
        """The alternative alleles, in order."""
        return tuple(self.field("ALT").split(","))

    def info(self, name: str, allele: int) -> str:
        """The value of an INFO key for an alternative allele (from 0): its own, where there is one for each."""
        for item in self.field("INFO").split(";"):
            key, equals, value = item.partition("=")
            if key == name:
                values = value.split(",")
                return values[allele] if len(values) == len(self.alternatives) else value if equals else "1"
        return ""


class VcfReader:
    """Iterates over the data lines of a VCF file, plain, gzip or BGZF; `-` is standard input.

    `header` is complete once the first data line is there. A file that breaks off gives its good lines first and then
    an InputError; one that is no VCF gives only that.
    """

    def __init__(self, path: Path | str) -> None:
        self.name = "standard input" if str(path) == "-" else str(path)
        self.header: list[str] = []
        self._path = path

    def __iter__(self) -> Iterator[Line]:
        good = 0
        for number, text in enumerate(self._lines(), start=1):
            if text.startswith("#"):
                if not good:
                    self.header.append(text)
                continue
            if not text.strip():
                continue
            line = _parse(number, text)
            if line.problem and not good and not self.header:
                raise InputError(f"{self.name} line {number}: {line.problem}; give a VCF file, plain or compressed")
            good += 1
            yield line
        if not good and not self.header:
            raise InputError(f"{self.name} is empty; give a VCF file")

    def _lines(self) -> Iterator[str]:
        with open_bytes(self._path, self.name, "VCF") as raw:
            file, bgzf = decompressed(raw, self.name, "VCF")
            try:
                for i, line in enumerate(file):
                    if i == 0 and line.startswith(b"BCF"):
                        raise InputError(f"{self.name} is BCF; make it VCF with: bcftools view {self.name}")
                    if b"\0" in line:
                        raise InputError(f"{self.name} line {i + 1} is not text; give a VCF file")
                    text = line[3 * (i == 0 and line.startswith(b"\xef\xbb\xbf")) :]  # a byte order mark
                    yield text.rstrip(b"\r\n").decode("utf-8", errors="surrogateescape")
                if bgzf is not None:
                    bgzf.check()
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(
                    f"{self.name} is cut off or damaged ({str(error) or 'it does not end'}); copy or download it again"
                ) from None
            except OSError as error:
                raise InputError(f"cannot read {self.name}: {error.strerror or error}; check it") from None


def _parse(number: int, text: str) -> Line:
    fields = tuple(text.split("\t"))
    if len(fields) < 5:
        return Line(number, fields, f"{len(fields)} columns, separated by tabs; at least five are needed")
    position = fields[1]
    if not (position.isascii() and position.isdecimal()) or len(position) > 12:
        return Line(number, fields, f"POS is {_shown(position)}, not a number")
    if not fields[3] or not set(fields[3]) <= _LETTERS:
        return Line(number, fields, f"REF is {_shown(fields[3])}; expected A, C, G, T or N")
    return Line(number, fields)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 20 else text[:17] + "...")


class Change(NamedTuple):
    """What an alternative allele changes in a genome, as short and as far to the left as it can be said."""

    record: int
    start: int
    "First base that is replaced, from 0; an insertion is before it."
    ref: str
    "Bases that are replaced; none for an insertion."
    alt: str
    "What comes in their place; nothing for a deletion."

    @property
    def kind(self) -> str:
        """snv, mnv, insertion, deletion or complex."""
        if len(self.ref) == len(self.alt):
            return "snv" if len(self.ref) == 1 else "mnv"
        return "complex" if self.ref and self.alt else "deletion" if self.ref else "insertion"

    def written(self, genome: Genome) -> tuple[int, str, str]:
        """POS, REF and ALT as VCF has them: alleles that are empty get the base before, or at the very start after."""
        if self.ref and self.alt:
            return self.start + 1, self.ref, self.alt
        if self.start:
            base = decode(genome.bases(self.record, self.start - 1, self.start))
            return self.start, base + self.ref, base + self.alt
        base = decode(genome.bases(self.record, len(self.ref), len(self.ref) + 1))
        return 1, self.ref + base, self.alt + base


class Problem(NamedTuple):
    """Why an allele is not a change that can be scored."""

    status: str
    note: str


def read_change(genome: Genome, records: Mapping[str, int], line: Line, allele: int) -> Change | Problem:
    """The change of a line's allele (from 0), its reference checked against the genome."""
    if line.problem:
        return Problem("invalid", f"line {line.number}: {line.problem}")
    alt = line.alternatives[allele]
    if alt in ("", ".", "*") or any(mark in alt for mark in "<>[]*."):
        return Problem("symbolic", f"{_shown(alt)} does not spell out a sequence")
    if not set(alt) <= _LETTERS - {"N", "n"}:
        return Problem("invalid", f"line {line.number}: ALT is {_shown(alt)}; expected A, C, G or T")
    record = records.get(line.field("CHROM"))
    if record is None:
        return Problem("no_record", f"the reference has no record {_shown(line.field('CHROM'))}")
    ref, alt, start = line.field("REF").upper(), alt.upper(), int(line.field("POS")) - 1
    end, length = start + len(ref), genome.length(record)
    if start < 0 or end > length:
        return Problem("outside", f"bases {start + 1} to {end} of a record of {length} bases")
    found = genome.bases(record, start, end)
    if (found != encode(ref.encode())).any():
        return Problem("mismatch", f"REF is {_shown(ref)}, the reference has {_shown(decode(found))}")
    if ref == alt:
        return Problem("symbolic", "ALT is REF: nothing changes")
    return normalised(genome, Change(record, start, ref, alt))


def normalised(genome: Genome, change: Change) -> Change:
    """The same change without bases that both alleles share, an insertion or deletion as far left as it goes.

    That is the one normal form of Tan et al. (Bioinformatics, 2015), but for the base that VCF puts before it.
    """
    record, start, ref, alt = change
    while ref and alt and ref[-1] == alt[-1]:
        ref, alt = ref[:-1], alt[:-1]
    while ref and alt and ref[0] == alt[0]:
        start, ref, alt = start + 1, ref[1:], alt[1:]
    moved = ref or alt
    if not (ref and alt):
        shift, block = 0, b""
        while start > shift:  # bases to the left, a block at a time
            if shift % 256 == 0:
                left = start - shift
                block = genome.bases(record, max(0, left - 256), left).tobytes()[::-1]
            base = block[shift % 256]
            if not A <= base <= T or "ACGT"[base - A] != moved[-1 - shift % len(moved)]:
                break
            shift += 1
        turn = shift % len(moved)
        moved = moved[len(moved) - turn :] + moved[: len(moved) - turn]
        start -= shift
    return Change(record, start, moved if ref and not alt else ref, moved if alt and not ref else alt)


def names_of(genome: Genome) -> dict[str, int]:
    """Numbers of records by every name that a VCF may use: their own, and with or without 'chr', and M for MT."""
    names = {name: i for i, name in enumerate(genome.names)}
    for name, i in list(names.items()):
        plain = name.removeprefix("chr")
        for other in (plain, f"chr{plain}", *(("M", "chrM", "MT") if plain in ("M", "MT") else ())):
            names.setdefault(other, i)
    return names


class VcfWriter:
    """Lines of a VCF, with more INFO, to a file that appears whole when the `with` block ends well.

    `fields` maps names of INFO fields to descriptions; each has a number per alternative allele. A suffix .gz makes
    BGZF, for which pysam is needed.
    """

    def __init__(self, path: Path, fields: Mapping[str, tuple[str, str]]) -> None:
        """`fields`: for each name its type (Float or String) and description."""
        self._path, self._fields = path, fields
        self.kept = 0

    def __enter__(self) -> "VcfWriter":
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self._path))
            try:
                file = _in_blocks(temporary, self._path) if self._path.suffix == ".gz" else open(temporary, "wb")
            except OSError as error:
                raise InputError(f"cannot write {self._path}: {error.strerror}; give another place") from None
            self._file = stack.enter_context(closing(file))
            self._open = stack.pop_all()
        return self

    def start(self, header: Sequence[str]) -> None:
        """The header, with the fields' lines before its last."""
        if not header or not header[-1].startswith("#CHROM"):
            header = [*(header or ["##fileformat=VCFv4.2"]), "#" + "\t".join(COLUMNS)]
        own = [
            f'##INFO=<ID={name},Number=A,Type={kind},Description="{text}">'
            for name, (kind, text) in self._fields.items()
        ]
        for text in (*header[:-1], *own, header[-1]):
            self._write(text)

    def write(self, line: Line, values: Sequence[Mapping[str, Any]]) -> None:
        """A line with the values of its alleles."""
        fields = list(line.fields)
        if not line.problem:
            fields += ["."] * (len(COLUMNS) - len(fields))
            added = [
                f"{name}=" + ",".join("." if value.get(name) is None else str(value[name]) for value in values)
                for name in self._fields
                if any(value.get(name) is not None for value in values)
            ]
            known = [item for item in fields[7].split(";") if item not in ("", ".") and
                     item.partition("=")[0] not in self._fields]  # fmt: skip
            fields[7] = ";".join(known + added) or "."
        self._write("\t".join(fields))

    def _write(self, text: str) -> None:
        try:
            self._file.write(text.encode("utf-8", errors="surrogateescape") + b"\n")
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}; make room") from None

    def __exit__(self, *raised: Any) -> None:
        self._open.__exit__(*raised)


def _in_blocks(temporary: Path, path: Path) -> Any:
    """A BGZF file to write to."""
    try:
        from pysam import BGZFile
    except ImportError:
        raise InputError(f"{path} needs pysam, which compresses in blocks; pip install pysam, or give .vcf") from None
    open(temporary, "wb").close()  # so that what the system refuses is told as such
    return BGZFile(str(temporary), "wb")
