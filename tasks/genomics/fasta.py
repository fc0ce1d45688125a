"""FASTA as a stream: records of token chunks, in memory that does not grow with the file or the record.

Plain, gzip and BGZF files are told apart by their first bytes, and standard input is the file `-`. GenBank, EMBL and
FASTQ are read as FASTA (formats.py). A damaged file gives its good records first; `FastaReader` then raises an
InputError that says what is wrong.
"""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.formats import as_fasta
from seqmodels.tasks.genomics.tokens import WHITE_SPACE, Counts, Tokens, encode_marked, tokens_of

BLOCK = 1 << 17
"Bytes read at a time."
_LONGEST_HEADER = 1 << 16
_BGZF_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_OTHER_FORMATS = {
    b"PK\x03\x04": ("a zip archive", "unpack it first"),
    b"BZh": ("compressed with bzip2", "use bunzip2 first"),
    b"\xfd7zXZ": ("compressed with xz", "use unxz first"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "use unzstd first"),
}


@dataclass
class Record:
    """One FASTA record, whose tokens are read once, in order, before the next record is asked for."""

    name: str
    "First word of the header."
    description: str
    "The rest of the header."
    number: int
    "Place in the file, from 1."
    counts: Counts = field(default_factory=Counts)
    "Statistics of what has been read so far; complete once the chunks are used up."
    truncated: bool = False
    "Whether the file broke off inside this record."
    marked: Iterator[Tokens] = field(default_factory=lambda: iter(()), repr=False)
    "Chunks (l,) of marked tokens of at most BLOCK bases; they end before the first invalid character."

    def chunks(self, keep_case: bool = False) -> Iterator[Tokens]:
        """The same chunks without marks; `keep_case` as for tokens.encode."""
        return (tokens_of(marked, keep_case) for marked in self.marked)

    def tokens(self) -> Tokens:
        """All tokens (l,) at once, for records that are known to fit into memory."""
        parts = list(self.chunks())
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)


class FastaReader:
    """Iterates over the records of a FASTA file (`-`: standard input) and raises an InputError for what is damaged.

    The error comes at the first step if nothing can be read, and after the last readable record otherwise.
    """

    def __init__(self, path: Path | str):
        self.name = "standard input" if str(path) == "-" else str(path)
        self._path = path
        self._problem: str | None = None
        self._broken = False  # the bytes ended too early
        self._bgzf: Bgzf | None = None

    def __iter__(self) -> Iterator[Record]:
        with open_bytes(self._path, self.name) as raw:
            stream, self._bgzf = decompressed(raw, self.name)
            yield from self._records(as_fasta(stream, self.name))
        if self._problem:
            raise InputError(self._problem)

    def _records(self, stream: io.BufferedIOBase) -> Iterator[Record]:
        parts = self._parts(stream)
        part = next(parts, None)
        if part is None and not self._problem:
            self._problem = f"{self.name} is empty; give a FASTA file"
        if part is not None and not part[0]:
            part = self._skip_text(part[1], parts)
        number = 0
        while part is not None:
            number += 1
            name, description = parse_header(part[1])
            record = Record(name, description, number)
            following: list[tuple[bool, bytes]] = []
            record.marked = self._encode(parts, record, following)
            yield record
            for _ in record.marked:  # what the caller has left
                pass
            part = following[0] if following else None

    def _skip_text(self, text: bytes, parts: Iterator[tuple[bool, bytes]]) -> tuple[bool, bytes] | None:
        """The first header after text that should not be there; None where records cannot be expected."""
        if b"\0" in text:
            self._problem = f"{self.name} is a binary file; give a FASTA file, plain or compressed with gzip"
            return None
        shown = text.strip().split(b"\n")[0][:30].decode("utf-8", errors="replace")
        self._problem = f"{self.name} has text before the first '>' ({shown!r}); remove it or give a FASTA file"
        header = next((part for part in parts if part[0]), None)
        if header is None and not self._broken:
            self._problem = f"{self.name} has no FASTA record (no line begins with '>'); give a FASTA file"
        return header

    def _encode(
        self, parts: Iterator[tuple[bool, bytes]], record: Record, following: list[tuple[bool, bytes]]
    ) -> Iterator[Tokens]:
        for is_header, part in parts:
            if is_header:
                following.append((is_header, part))
                return
            if record.counts.invalid is None:
                marked = encode_marked(part, record.counts)
                if len(marked):
                    yield marked
        record.truncated = self._broken

    def _parts(self, stream: io.BufferedIOBase) -> Iterator[tuple[bool, bytes]]:
        """Cuts the stream into parts: (True, a whole header line without '>') and (False, bytes of sequence)."""
        header: bytes | None = None  # the beginning of a header that has not ended yet
        line_start = True
        for number, block in enumerate(self._blocks(stream)):
            i = 3 if number == 0 and block.startswith(b"\xef\xbb\xbf") else 0  # a byte order mark
            while i < len(block):
                if header is not None:
                    end = block.find(b"\n", i)
                    header += block[i:] if end < 0 else block[i:end]
                    if len(header) > _LONGEST_HEADER:
                        start = header[:20].decode(errors="replace")
                        self._problem = (
                            f"{self.name} has a header line of more than {_LONGEST_HEADER} bytes ('>{start}...'); "
                            "is it FASTA, with the line ends of Unix or Windows?"
                        )
                        return
                    if end < 0:
                        break
                    yield True, header
                    header, line_start, i = None, True, end + 1
                elif line_start and block[i] == ord(">"):
                    header, i = b"", i + 1
                else:
                    end = block.find(b"\n>", i) + 1 or len(block)
                    part = block[i:end]
                    if part.strip(WHITE_SPACE):
                        yield False, part
                    line_start, i = part.endswith(b"\n"), end
        if header is not None:
            yield True, header

    def _blocks(self, stream: io.BufferedIOBase) -> Iterator[bytes]:
        """Blocks of bytes; what goes wrong on the way ends them and is kept for later."""
        try:
            while block := stream.read1(BLOCK):  # read() would lose what comes before a cut
                yield block
            if self._bgzf is not None:
                self._bgzf.check()
        except InputError as error:  # of another format
            self._problem = str(error)
        except EOFError:
            self._fail("is cut off (the gzip stream does not end); copy or download it again")
        except (zlib.error, gzip.BadGzipFile) as error:
            self._fail(f"is damaged ({error}); copy or download it again")
        except OSError as error:
            self._fail(f"cannot be read: {error.strerror or error}")

    def _fail(self, what: str) -> None:
        self._problem, self._broken = f"{self.name} {what}", True


def open_bytes(path: Path | str, name: str, what: str = "FASTA") -> io.BufferedReader:
    """A file (`-`: standard input) as it is; an InputError if it cannot be opened."""
    if str(path) == "-":
        return io.BufferedReader(_Unclosed(sys.stdin.buffer))
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; check the path") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a folder; give a {what} file") from None
    except OSError as error:
        raise InputError(f"cannot open {name}: {error.strerror}; check its permissions") from None


def decompressed(raw: io.BufferedReader, name: str, what: str = "FASTA") -> tuple[io.BufferedIOBase, "Bgzf | None"]:
    """What a file holds, plain or compressed with gzip or BGZF; in that case also what says whether it was whole."""
    head = raw.peek(64)[:64]
    if head[:2] == b"\x1f\x8b":
        if head[3:4] != b"\x04" or head[12:14] != b"BC":
            return gzip.GzipFile(fileobj=raw), None
        bgzf = Bgzf(raw)
        return gzip.GzipFile(fileobj=io.BufferedReader(bgzf, BLOCK)), bgzf
    for magic, (found, remedy) in _OTHER_FORMATS.items():
        if head.startswith(magic):
            raise InputError(f"{name} is not {what} but {found}; {remedy}")
    return raw, None


class _Unclosed(io.RawIOBase):
    """Standard input behind a buffer of our own, which may be closed without closing standard input."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class Bgzf(io.RawIOBase):
    """A BGZF stream that remembers its last 28 bytes: an empty block, which every writer adds, unless it was cut off.

    Each block of BGZF is a whole gzip member, so that a file cut between two blocks looks intact to gzip.
    """

    def __init__(self, stream: io.BufferedReader):
        self._stream = stream
        self._tail = b""

    def check(self) -> None:
        """An EOFError if the last block is missing; asked once everything has been read."""
        if self._tail != _BGZF_END:
            raise EOFError

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._tail = (self._tail + data[-len(_BGZF_END) :])[-len(_BGZF_END) :]
        return len(data)


def parse_header(header: bytes) -> tuple[str, str]:
    """Name and description of a header line without its >."""
    text = header.decode("utf-8", errors="replace")
    if not text.isprintable():  # tabs and what a terminal would obey
        text = "".join(c if c.isprintable() else " " for c in text)
    words = text.split(None, 1)
    return (words[0] if words else ""), (words[1].strip() if len(words) > 1 else "")
