"""Time and memory of `longseq dna classify` with the shipped model on one long record, start-up included.

    python benchmarks/classify.py                                        # five million random bases, on a CPU
    python benchmarks/classify.py --bases 1000000 100000000 400000000 --genomes data/*.fa.gz --device cuda

With --genomes the record is their sequences one after the other, again from the start until it is long enough. Several
lengths tell the start-up from the rest.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
from record import write_result

from seqmodels.tasks.genomics.fasta import FastaReader
from seqmodels.tasks.genomics.tokens import decode


def random_bases(count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for start in range(0, count, 1 << 20):
        yield rng.choice(np.frombuffer(b"ACGT", np.uint8), min(1 << 20, count - start)).tobytes()


def real_bases(files: list[Path], count: int) -> Iterator[bytes]:
    for path in chain.from_iterable(repeat(files)):
        for record in FastaReader(path):
            for tokens in record.chunks():
                part = decode(tokens[:count]).encode()
                count -= len(part)
                yield part
                if not count:
                    return


def main() -> None:
    """Run the command once for each length and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=int, nargs="+", default=[5_000_000])
    parser.add_argument("--genomes", type=Path, nargs="+", help="FASTA files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    rows = [measure(bases, options) for bases in options.bases]
    name = "classify" if options.device == "cpu" and not options.genomes else f"classify-{options.device}"
    print(write_result(name, rows, options.commit))


def measure(bases: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of the command on one record."""
    source = real_bases(options.genomes, bases) if options.genomes else random_bases(bases)
    with tempfile.TemporaryDirectory() as folder:
        fasta, table = Path(folder) / "one.fa", Path(folder) / "one.tsv"
        with fasta.open("wb") as file:
            file.write(b">one\n")
            for part in source:
                file.write(part + b"\n")
        command = [sys.executable, "-m", "seqmodels", "dna", "classify", str(fasta), "-o", str(table)]
        started = time.monotonic()
        process = subprocess.Popen([*command, "--device", options.device])
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        if status or "\tok\t" not in table.read_text():
            raise SystemExit(f"classify failed with status {status}")
    row = {
        "bases": bases,
        "sequence": "genomes" if options.genomes else "random",
        "device": options.device,
        "model": "enterobacteria",
        "seconds": seconds,
        "bases_per_second": bases / seconds,
        "peak_memory_mib": usage.ru_maxrss / 1024,
    }
    print(f"{row['bases_per_second']:,.0f} bases/s with start-up, {row['peak_memory_mib']:,.0f} MiB at most")
    return row


if __name__ == "__main__":
    main()
