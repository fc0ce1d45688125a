"""GenBank, EMBL and FASTQ, read by Biopython, as a stream of FASTA; a record at a time."""

import io
import warnings
import zlib
from collections.abc import Iterator

from seqmodels.errors import InputError

_FORMATS = {b"LOCUS ": "GenBank", b"ID   ": "EMBL", b"@": "FASTQ"}


def format_of(stream: io.BufferedIOBase) -> str | None:
    """Which of these formats a stream begins as, without reading from it; None for others, such as FASTA."""
    try:
        head = stream.peek(8)[:8]  # type: ignore[attr-defined]  # files and gzip streams have it
    except (EOFError, OSError, zlib.error):  # who reads it tells what is wrong
        return None
    return next((kind for magic, kind in _FORMATS.items() if head.startswith(magic)), None)


def as_fasta(stream: io.BufferedIOBase, name: str) -> io.BufferedIOBase:
    """The stream as it is, or as FASTA if it begins as one of these formats do.

    Names are those of Biopython: accession and version, or what follows the @ of FASTQ. Reading raises an InputError
    after the last record that is whole.
    """
    kind = format_of(stream)
    return stream if kind is None else io.BufferedReader(_Converted(_records(stream, kind, name)))


class _Converted(io.RawIOBase):
    """What an iterator gives, as a stream."""

    def __init__(self, records: Iterator[bytes]):
        self._records, self._rest = records, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        rest = self._rest or next(self._records, b"")
        count = min(len(buffer), len(rest))
        buffer[:count], self._rest = rest[:count], rest[count:]
        return count


def _records(stream: io.BufferedIOBase, kind: str, name: str) -> Iterator[bytes]:
    """Records as FASTA, the sequence in one line."""
    from Bio.Seq import UndefinedSequenceError

    text, whole = io.TextIOWrapper(stream, encoding="utf-8", errors="replace"), 0
    try:
        for title, bases in _parsed(text, kind):
            yield b">" + " ".join(title.split()).encode() + b"\n" + bases + b"\n"
            whole += 1
    except UndefinedSequenceError:
        said = f"record {whole + 1} of {kind} has no sequence in this file; download it with its sequence"
        raise InputError(f"{name}: {said}") from None
    except Exception as error:  # whatever a parser says of a damaged file
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{name} is not whole {kind} after record {whole} ({said}); copy it again") from None
    finally:
        if not text.closed:
            text.detach()  # who has opened the stream closes it
    if not whole:
        raise InputError(f"{name} has no record of {kind}; look into it")


def _parsed(text: io.TextIOBase, kind: str) -> Iterator[tuple[str, bytes]]:
    """Titles and bases."""
    from Bio import SeqIO
    from Bio.SeqIO.QualityIO import FastqGeneralIterator

    if kind == "FASTQ":
        for title, bases, _ in FastqGeneralIterator(text):
            yield title, bases.encode()
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields other than the sequence
        for record in SeqIO.parse(text, kind.lower()):
            yield f"{record.id} {record.description}", bytes(record.seq)
