"""Times reading FASTA into tokens: 100 million bases from one record, from many records, and from gzip and BGZF.

    python benchmarks/fasta.py

The files are pseudo-random bases in mixed case with runs of N, made in a temporary folder. Each figure is the median
of five passes on one core, with the file in the page cache.
"""

import gzip
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from record import write_result

from seqmodels.tasks.genomics.fasta import FastaReader

BASES = 100_000_000
REPEATS = 5


def make_sequence(rng: np.random.Generator) -> np.ndarray:
    """BASES letters as bytes: 40 % in lower case, in stretches, and 1 % N in runs of 1,000."""
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)[rng.integers(0, 4, BASES, dtype=np.uint8)]
    for start in rng.integers(0, BASES - 4000, BASES // 10_000):
        letters[start : start + 4000] |= 0x20
    for start in rng.integers(0, BASES - 1000, BASES // 100_000):
        letters[start : start + 1000] = ord("N")
    return letters


def fasta(letters: np.ndarray, records: int) -> bytes:
    """FASTA of so many records of equal length, 80 bases per line."""
    parts = []
    for i, sequence in enumerate(np.split(letters, records)):
        whole = len(sequence) // 80 * 80
        lines = np.full((whole // 80, 81), ord("\n"), dtype=np.uint8)
        lines[:, :80] = sequence[:whole].reshape(-1, 80)
        parts.append(f">record_{i} made for timing\n".encode() + lines.tobytes())
        if len(sequence) > whole:
            parts.append(sequence[whole:].tobytes() + b"\n")
    return b"".join(parts)


def write_bgzf(path: Path, text: bytes) -> None:
    """BGZF: gzip members of at most 64 KiB, each with its size in an extra field."""
    import struct
    import zlib

    with open(path, "wb") as file:
        for start in [*range(0, len(text), 65280), len(text)]:
            block = text[start : start + 65280]
            deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
            body = deflate.compress(block) + deflate.flush()
            file.write(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0" + struct.pack("<H", len(body) + 25))
            file.write(body + struct.pack("<II", zlib.crc32(block), len(block)))


def seconds(path: Path) -> float:
    """Time of one pass over all records."""
    start = time.perf_counter()
    bases = 0
    for record in FastaReader(path):
        for chunk in record.chunks():
            bases += len(chunk)
    duration = time.perf_counter() - start
    assert bases == BASES
    return duration


def main() -> None:
    """Measures, prints and records."""
    letters = make_sequence(np.random.default_rng(0))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.fa"
        for what, records, container in (
            ("one record", 1, "plain"),
            ("one record", 1, "gzip"),
            ("one record", 1, "BGZF"),
            ("1,000 records of 100 kb", 1_000, "plain"),
            ("100,000 records of 1 kb", 100_000, "plain"),
        ):
            text = fasta(letters, records)
            if container == "BGZF":
                write_bgzf(path, text)
            else:
                path.write_bytes(text if container == "plain" else gzip.compress(text, 6))
            median = statistics.median(seconds(path) for _ in range(REPEATS))
            rows.append(
                {
                    "input": what,
                    "container": container,
                    "megabases": BASES / 1e6,
                    "megabytes_of_text": len(text) / 1e6,
                    "seconds": median,
                    "megabases_per_second": BASES / 1e6 / median,
                    "repeats": REPEATS,
                }
            )
            print(f"{what:26} {container:6} {median:6.2f} s {BASES / 1e6 / median:7.1f} Mb/s", flush=True)
    write_result("fasta", rows)


if __name__ == "__main__":
    main()
