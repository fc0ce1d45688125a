"""Makes the picture of README.md again, and what its examples print.

    LONGSEQ_DATA=data python docs/readme.py

Runs the page's blocks `sh` and `python` in an empty folder that has examples/, puts what they print into the block
`text` that follows (as docs/audio.py does for its page), and draws docs/readme.png. The upper part is a model that the
program trains on E. coli K-12 (TRAINING: three minutes on one CPU core) at work on the first bases held out of it,
beside the annotation; the lower part is the sound that the page's example has generated.
"""

import csv
import gzip
import os
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
from audio import BLOCK, run
from matplotlib.figure import Figure
from PIL import Image

from seqmodels.cli import main
from seqmodels.tasks.audio.picture import spectrogram
from seqmodels.tasks.audio.waveform import read_audio

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "README.md", ROOT / "docs" / "readme.png"
GENOME, GENES = "ecoli_K12_MG1655.fa.gz", "ecoli_K12_MG1655.cds.bed.gz"
RECORD, START, END = "NC_000913.3", 4_160_000, 4_190_000  # drawn: the first bases held out
TRAINING = (
    f"--annotation {GENES} --stranded --strands conjoined --validation {RECORD}:3700001-3710000 "
    f"--leave-out {RECORD}:{START + 1}-4641652 --bidirectional --n-layer 1 --d-model 64 --d-state 32 --kmer 6 "
    "--kmer-width 64 --window 4096 --batch-tokens 16384 --training.max-steps 150 --training.learning-rate 1e-2 "
    "--training.validate-every 150 --training.device cpu"
)
FORWARD, REVERSE = "tab:blue", "tab:orange"


def longseq(line: str) -> None:
    """One command; ends where it fails."""
    if main(shlex.split(line)):
        sys.exit(f"failed: longseq {line}")


def track(path: Path) -> np.ndarray:
    """Values (END - START,) of a bedGraph file; 0 where it has none."""
    values = np.zeros(END - START)
    for line in path.read_text().splitlines():
        if line.startswith(RECORD):
            start, end, value = line.split()[1:]
            values[max(int(start) - START, 0) : max(int(end) - START, 0)] = float(value)
    return values


def genes(path: Path) -> list[tuple[int, int, str]]:
    """First base, base after the last, and strand of the genes of a BED file between START and END."""
    with gzip.open(path, "rt") as file:
        rows = [(int(row[1]), int(row[2]), row[5]) for row in csv.reader(file, delimiter="\t") if row[0] == RECORD]
    return [(start, end, strand) for start, end, strand in rows if start < END and end > START]


def draw(forward: np.ndarray, reverse: np.ndarray, annotated: list, samples: np.ndarray, sample_rate: int) -> Figure:
    """The picture: probabilities (END - START,) of coding on both strands and the genes there, above a sound (l,)."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    rows = [["genes", "genes"], ["track", "track"], ["wave", "spectrum"]]
    axes = figure.subplot_mosaic(rows, height_ratios=(1, 4, 4))
    kilobases = np.arange(START, END) / 1000
    for sign, values, colour in ((1, forward, FORWARD), (-1, reverse, REVERSE)):
        axes["track"].fill_between(kilobases, sign * values, color=colour, linewidth=0)
    axes["track"].axhline(0, color="black", linewidth=0.5)
    axes["track"].set(xlim=(START / 1000, END / 1000), ylim=(-1, 1), xlabel="E. coli K-12, held out of training (kb)")
    axes["track"].set(ylabel="probability of\ncoding", yticks=(-1, 0, 1), yticklabels=("1 (-)", "0", "1 (+)"))
    for start, end, strand in annotated:
        height, colour = (1, FORWARD) if strand == "+" else (0, REVERSE)
        axes["genes"].broken_barh([(start / 1000, (end - start) / 1000)], (height + 0.1, 0.8), color=colour)
    axes["genes"].set(xlim=(START / 1000, END / 1000), ylim=(0, 2), xticks=(), yticks=(0.5, 1.5), yticklabels="-+")
    axes["genes"].set(ylabel="genes", title="Which strand is coding? Annotated, and found by a bidirectional Mamba-2")
    seconds = len(samples) / sample_rate
    axes["wave"].plot(np.arange(len(samples)) / sample_rate, samples, linewidth=0.4)
    axes["wave"].set(title='"seven", generated sample by sample', xlabel="time (s)", ylabel="amplitude")
    axes["wave"].set(xlim=(0, seconds), ylim=(-1, 1))
    axes["spectrum"].imshow(
        spectrogram(samples).T, origin="lower", aspect="auto", extent=(0, seconds, 0, sample_rate / 2000), cmap="magma"
    )
    axes["spectrum"].set(title="its spectrogram", xlabel="time (s)", ylabel="frequency (kHz)")
    return figure


if __name__ == "__main__":
    page, here = PAGE.read_text(), Path.cwd()
    data = Path(os.environ["LONGSEQ_DATA"]).resolve() / "genomes" / "enterobacteria"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("examples").symlink_to(ROOT / "examples")
        for name in (GENOME, GENES):
            Path(name).symlink_to(data / name)
        page = BLOCK.sub(run, page)
        longseq(f"dna train {GENOME} run {TRAINING}")
        longseq(f"dna classify {GENOME} --model run/model --region {RECORD}:{START + 1}-{END} -o t.tsv --track coding")
        tracks = [track(Path(f"coding.CDS{strand}.bedgraph")) for strand in "+-"]
        draw(*tracks, genes(Path(GENES)), *read_audio(Path("seven.flac"))).savefig("picture.png", dpi=110)
        Image.open("picture.png").quantize(64).save(PICTURE)
        os.chdir(here)
    PAGE.write_text(page)
