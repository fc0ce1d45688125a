"""Genomes on disk: the records of FASTA files as tokens in one file that is mapped into memory.

Any stretch of any record is read without the rest, by as many processes as there are, from plain, gzip and BGZF files
alike. It takes a byte per base on disk and memory only for what is in use.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from seqmodels.errors import InputError
from seqmodels.files import make_folder, replacing, write_json
from seqmodels.tasks.genomics.fasta import FastaReader
from seqmodels.tasks.genomics.intervals import parse_region
from seqmodels.tasks.genomics.tokens import N, Tokens

_BASES = np.uint8(0x0F)


@dataclass(frozen=True)
class Genome:
    """Records by name; bases are counted from 0."""

    names: tuple[str, ...]
    "Names of the records, each once, in the order of the files."
    starts: tuple[int, ...]
    "Where each record begins in `coded`, and the end of the last."
    coded: Tokens
    "Tokens of all records, those of lower-case letters with the flag SOFT_MASKED."

    def length(self, record: int) -> int:
        """Bases of a record."""
        return self.starts[record + 1] - self.starts[record]

    def coded_bases(self, record: int, start: int, end: int) -> Tokens:
        """Tokens (end - start,) of the record with their flag; a view, inside of the record."""
        first = self.starts[record]
        return self.coded[first + start : first + end]

    def bases(self, record: int, start: int, end: int) -> Tokens:
        """Tokens (end - start,) of the record without flags, N where they lie outside of it."""
        first, last = max(0, start), min(end, self.length(record))
        inside = self.coded_bases(record, first, max(first, last)) & _BASES
        if len(inside) == end - start:
            return inside
        whole = np.full(end - start, N, dtype=np.uint8)
        if len(inside):
            whole[first - start : last - start] = inside
        return whole


@dataclass(frozen=True)
class Stretch:
    """Bases start..end (from 0, end excluded) of a record."""

    record: int
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def whole_records(genome: Genome) -> list[Stretch]:
    """Every record as one stretch."""
    return [Stretch(i, 0, genome.length(i)) for i in range(len(genome.names))]


def stretches_of(genome: Genome, text: str, option: str) -> list[Stretch]:
    """The stretches that an option names, with commas between: records (chr8) or parts of them (chr8:1-5,000,000)."""
    lengths = {name: genome.length(i) for i, name in enumerate(genome.names)}
    found = []
    for part in filter(None, map(str.strip, re.split(r",(?!\d{3}(?!\d))", text))):
        region = parse_region(part, lengths)
        if region.seq not in lengths:
            few = ", ".join(genome.names[:10]) + (", ..." if len(genome.names) > 10 else "")
            raise InputError(
                f"{option} names the record {region.seq!r}, which the genomes do not have; they have {few}"
            )
        if region.end > lengths[region.seq]:
            raise InputError(f"{option}: {part} ends beyond {region.seq}, which has {lengths[region.seq]} bases")
        found.append(Stretch(genome.names.index(region.seq), region.start, region.end))
    return found


def without(stretches: list[Stretch], taken: list[Stretch]) -> list[Stretch]:
    """What is left of stretches where others are taken out."""
    for hole in taken:
        stretches = [
            part
            for s in stretches
            for part in (
                [Stretch(s.record, s.start, min(s.end, hole.start)), Stretch(s.record, max(s.start, hole.end), s.end)]
                if s.record == hole.record and s.start < hole.end and hole.start < s.end
                else [s]
            )
            if len(part) > 0
        ]
    return stretches


def held_out(stretches: list[Stretch], fraction: float, seed: int) -> tuple[list[Stretch], list[Stretch]]:
    """What is left of each stretch, and a part of it, at a random place, that is held out."""
    rng, left, held = np.random.default_rng((seed, 2)), [], []
    for s in stretches:
        size = round(fraction * len(s))
        start = s.start + int(rng.integers(len(s) - size + 1))
        held.append(Stretch(s.record, start, start + size))
        left += [Stretch(s.record, s.start, start), Stretch(s.record, start + size, s.end)]
    return left, held


def read_genome(files: Sequence[Path], folder: Path | None = None) -> Genome:
    """The records of FASTA files, from genome.tokens in `folder`, which is made where it is not there or not of them.

    Without a folder the tokens are in an unnamed temporary file. Damaged files, characters that are no base, records
    without bases and names that come twice are an InputError.
    """
    if folder is None:
        with tempfile.TemporaryFile() as file:
            names, starts = _write(files, file)
            return Genome(names, starts, _mapped(file))
    tokens, index = folder / "genome.tokens", folder / "genome.json"
    made_of = _identity(files)
    try:
        known = json.loads(index.read_text(encoding="utf-8"))
        if made_of and known["made_of"] == made_of and tokens.stat().st_size == known["starts"][-1]:
            return Genome(tuple(known["names"]), tuple(known["starts"]), _mapped(tokens))
    except (OSError, ValueError, KeyError):
        pass  # not there, or not whole
    make_folder(folder)
    with replacing(tokens) as temporary, open(temporary, "w+b") as file:
        names, starts = _write(files, file)
        coded = _mapped(file)
    write_json(index, {"made_of": made_of, "names": names, "starts": starts})
    return Genome(names, starts, coded)


def _identity(files: Sequence[Path]) -> str:
    """What tells these files from others, and from themselves after a change; nothing for standard input."""
    try:
        parts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:
        return ""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write(files: Sequence[Path], file: BinaryIO) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names: dict[str, None] = {}
    starts = [0]
    for path in files:
        for record in FastaReader(path):
            where = f"{path}, record {record.name!r}"
            if record.name in names:
                raise InputError(f"{where}: a record of this name came before; rename one")
            for chunk in record.chunks(keep_case=True):
                file.write(chunk.tobytes())
            if record.counts.invalid:
                position, character = record.counts.invalid
                raise InputError(f"{where}: {character!r} at position {position} is no base; remove or correct it")
            if not record.counts.length:
                raise InputError(f"{where} has no bases; remove it")
            names[record.name] = None
            starts.append(starts[-1] + record.counts.length)
    file.flush()
    return tuple(names), tuple(starts)


def _mapped(file: BinaryIO | Path) -> Tokens:
    if os.fstat(file.fileno()).st_size if not isinstance(file, Path) else file.stat().st_size:
        return np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray)
    return np.zeros(0, dtype=np.uint8)
