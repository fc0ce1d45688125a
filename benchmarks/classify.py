"""Time and memory of `longseq dna classify` with the shipped model on one record of five million random bases.

python benchmarks/classify.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from record import write_result

BASES = 5_000_000


def main() -> None:
    """Run the command once on a CPU, start-up included, and record it."""
    bases = np.random.default_rng(0).choice(np.frombuffer(b"ACGT", np.uint8), BASES).tobytes()
    with tempfile.TemporaryDirectory() as folder:
        fasta, table = Path(folder) / "one.fa", Path(folder) / "one.tsv"
        fasta.write_bytes(b">one\n" + bases + b"\n")
        command = [
            sys.executable,
            "-m",
            "seqmodels",
            "dna",
            "classify",
            str(fasta),
            "-o",
            str(table),
            "--device",
            "cpu",
        ]
        started = time.monotonic()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        if status or "\tok\t" not in table.read_text():
            raise SystemExit(f"classify failed with status {status}")
    row = {
        "bases": BASES,
        "model": "enterobacteria",
        "seconds": seconds,
        "bases_per_second": BASES / seconds,
        "peak_memory_mib": usage.ru_maxrss / 1024,
    }
    print(f"{row['bases_per_second']:,.0f} bases/s with start-up, {row['peak_memory_mib']:,.0f} MiB at most")
    print(write_result("classify", [row]))


if __name__ == "__main__":
    main()
