"""Random access to the sequences of a FASTA file, through pyfaidx.

An index beside the file (.fai; .gzi too for BGZF) is used if it is not older than the file, and made there if missing
or older (where that cannot be written, in a temporary folder). What cannot be indexed as it stands (gzip that is not
BGZF, standard input, lines of different lengths) is first unpacked into a temporary file, in `TMPDIR`.
"""

import contextlib
import os
import shutil
import tempfile
import warnings
import weakref
import zlib
from collections.abc import Iterator
from gzip import BadGzipFile
from pathlib import Path
from typing import Any

import pyfaidx

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.fasta import BLOCK, FastaReader, decompressed, open_bytes, parse_header
from seqmodels.tasks.genomics.formats import as_fasta, format_of
from seqmodels.tasks.genomics.tokens import WHITE_SPACE

_NO_BASE = (bytes(range(128)) + b"\x7f" * 128).replace(b">", b"\x7f")  # what pyfaidx would not take for sequence


def _is_regular(path: Path, name: str) -> bool:
    """Whether the lines of each record are of one length, but for a shorter last one, and have nothing but ASCII.

    pyfaidx indexes a record whose last line is longer without a word, and then finds other bases than are asked for.
    """
    with open_bytes(path, name) as raw:
        stream, bgzf = decompressed(raw, name)
        bases = width = 0  # of the first line, without and with its end
        ended = False
        for line in stream:
            if line.startswith(b">"):
                bases, width, ended = 0, 0, False
                continue
            size = len(line.rstrip(b"\r\n"))
            bases, width = bases or size, width or len(line)
            uneven = size > bases or (size == bases and len(line) != width and line.endswith(b"\n"))
            if uneven or (ended and size) or not line.isascii() or any(c in line[:size] for c in b" \t\r"):
                return False
            ended = ended or size < bases
        if bgzf is not None:
            bgzf.check()
    return True


def _writable(folder: Path) -> bool:
    """Whether files may be made in a folder; not in one without any permission to, also if root could."""
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)


def _key(name: str) -> str:
    return parse_header(name.encode(errors="replace"))[0]


class IndexedFasta:
    """The sequences of a FASTA file by name; opened when first asked, once in each process, also after pickling."""

    def __init__(self, path: Path | str) -> None:
        self.name = "standard input" if str(path) == "-" else str(path)
        self.path = path
        self._opened: tuple[int, pyfaidx.Faidx] | None = None

    @property
    def lengths(self) -> dict[str, int]:
        """Bases of each sequence, in the order of the file."""
        return {name: record.rlen for name, record in self._faidx.index.items()}

    def fetch(self, seq: str, start: int, end: int) -> bytes:
        """Bases start .. end (from 0, end excluded) as the file has them, and N for those beyond its ends."""
        length = self._faidx.index[seq].rlen
        first, last = min(max(start, 0), length), min(max(end, 0), length)
        try:
            found = self._faidx.fetch(seq, first + 1, last).encode() if first < last else b""
        except UnicodeDecodeError:
            found = b""
        if len(found.translate(None, WHITE_SPACE)) != last - first:
            raise InputError(
                f"{self.name}: bases {first + 1} to {last} of {seq} cannot be found: white space within lines, or "
                f"an index ({Path(self.name).name}.fai) of another file; remove it"
            )
        return b"N" * (min(end, 0) - min(start, 0)) + found + b"N" * (max(end, length) - max(start, length))

    def blocks(self, seq: str, start: int, end: int, backwards: bool = False) -> Iterator[bytes]:
        """The same in blocks; backwards from the last block to the first."""
        starts = range(start, end, BLOCK)
        for at in reversed(starts) if backwards else starts:
            yield self.fetch(seq, at, min(at + BLOCK, end))

    def __getstate__(self) -> dict[str, Any]:
        if str(self.path) == "-":
            raise InputError("standard input cannot be read by several processes; name a file")
        return {**self.__dict__, "_opened": None}

    @property
    def _faidx(self) -> pyfaidx.Faidx:
        if self._opened is None or self._opened[0] != os.getpid():  # a forked process has its parent's file position
            self._opened = (os.getpid(), self._open())
        return self._opened[1]

    def _open(self) -> pyfaidx.Faidx:
        if str(self.path) != "-":
            path = Path(self.path)
            with open_bytes(path, self.name) as raw:
                stream, bgzf = decompressed(raw, self.name)
                suffix = path.suffix.lower()  # pyfaidx goes by it
                as_it_is = suffix in (".gz", ".bgz") if bgzf else stream is raw and suffix not in (".gz", ".bgz")
                as_it_is = as_it_is and format_of(stream) is None
            next(iter(FastaReader(path)))  # says what is no FASTA at all
            if as_it_is:
                with contextlib.suppress(pyfaidx.FastaIndexingError, RuntimeError, UnicodeDecodeError):
                    return self._indexed(path)
        folder = self._temporary_folder()
        self._unpack(folder / "genome.fa")
        try:
            return self._indexed(folder / "genome.fa")
        except (pyfaidx.FastaIndexingError, RuntimeError) as error:
            raise InputError(f"{self.name} cannot be indexed: {' '.join(str(error).split())}") from None

    def _temporary_folder(self) -> Path:
        folder = tempfile.mkdtemp(prefix="longseq-")
        owner = os.getpid()
        weakref.finalize(self, lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
        return Path(folder)

    def _indexed(self, path: Path) -> pyfaidx.Faidx:
        """With the index beside the file, or a new one; nobody ever sees half of one."""
        suffixes = [".fai", ".gzi"] if path.suffix.lower() in (".gz", ".bgz") else [".fai"]
        beside = [path.with_name(path.name + suffix) for suffix in suffixes]
        try:
            made = path.stat().st_mtime
            if all(index.is_file() and index.stat().st_mtime >= made for index in beside):
                return self._faidx_of(path, beside)
            if not _is_regular(path, self.name):
                raise pyfaidx.FastaIndexingError("lines of different lengths")
            folder = path.parent if _writable(path.parent) else self._temporary_folder()
            new = [folder / f".{index.name}.{os.getpid()}.tmp" for index in beside]
            try:
                faidx = self._faidx_of(path, new)
                if folder == path.parent:
                    for index, place in zip(new, beside, strict=True):
                        os.replace(index, place)
            finally:
                for index in new:
                    if folder == path.parent:
                        index.unlink(missing_ok=True)
            return faidx
        except (OSError, EOFError, zlib.error) as error:
            said = getattr(error, "strerror", None) or "it is cut off, or damaged, or its index cannot be written"
            raise InputError(f"cannot index {self.name}: {said}; copy or download it again, or make room") from None

    def _faidx_of(self, path: Path, indices: list[Path]) -> pyfaidx.Faidx:
        gzi = {"gzi_indexname": str(indices[1])} if len(indices) > 1 else {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return pyfaidx.Faidx(str(path), str(indices[0]), as_raw=True, key_function=_key, **gzi)
        except (ValueError, IndexError, zlib.error) as error:
            if isinstance(error, UnicodeDecodeError):
                raise
            said = " ".join(str(error).split())
            if said.startswith("Duplicate key"):
                raise InputError(
                    f"{self.name} has several sequences named {said.removeprefix('Duplicate key ')}, which intervals "
                    "cannot tell apart; rename them"
                ) from None
            raise InputError(f"the index of {self.name} is damaged ({said}); remove {indices[0].name}") from None

    def _unpack(self, place: Path) -> None:
        """The records as plain FASTA, each in one line."""
        try:
            with open_bytes(self.path, self.name) as raw, open(place, "wb") as file:
                stream, bgzf = decompressed(raw, self.name)
                stream = as_fasta(stream, self.name)
                number, at_start = 0, True
                while line := stream.readline(BLOCK):
                    if number == 0 and line.startswith(b"\xef\xbb\xbf"):
                        line = line[3:]
                    if at_start and line.startswith(b">"):
                        while not line.endswith(b"\n") and (more := stream.readline(BLOCK)):
                            line += more
                        name, _ = parse_header(line[1:])
                        if not name:
                            raise InputError(f"{self.name}: record {number + 1} has no name, which intervals need")
                        file.write((b"\n" if number else b"") + b">" + name.encode() + b"\n")
                        number += 1
                    elif number:
                        file.write(line.translate(_NO_BASE, WHITE_SPACE))
                    elif line.strip():
                        raise InputError(f"{self.name} has text before the first '>'; remove it or give a FASTA file")
                    at_start = line.endswith(b"\n")
                if not number:
                    raise InputError(f"{self.name} is empty; give a FASTA file")
                file.write(b"\n")
                if bgzf is not None:
                    bgzf.check()
        except EOFError:
            raise InputError(f"{self.name} is cut off (the gzip stream does not end); copy it again") from None
        except (zlib.error, BadGzipFile) as error:
            raise InputError(f"{self.name} is damaged ({error}); copy or download it again") from None
        except OSError as error:
            said = f"{error.strerror or error}; it takes room in {place.parent.parent}"
            raise InputError(f"cannot unpack {self.name}: {said}") from None
