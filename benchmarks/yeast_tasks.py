"""Two tasks in GUE's format that no recipe was chosen on: does a recipe carry over?

    python benchmarks/yeast_tasks.py $LONGSEQ_DATA/genomes/yeast_s288c runs/yeast-tasks
    python benchmarks/gue.py runs/yeast-tasks runs/yeast-hybrid --name yeast-hybrid -- (the recipe's options)

Windows of 101 bases of the genome of baker's yeast, on the strand of what is asked for, as many of each class:

    coding   wholly inside a coding interval, in any frame, or overlapping none (these on a strand by chance)
    start    with the first ATG of a coding sequence in their middle, or another ATG, coding or not

Train are chromosomes I to XIII, dev is XIV, test XV and XVI. Windows of a class are drawn without repetition.
"""

import argparse
import csv
import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from Bio import SeqIO
from Bio.Seq import reverse_complement

from seqmodels.files import make_folder
from seqmodels.tasks.genomics.intervals import Interval, read_intervals

LENGTH = 101
SPLITS = {"dev": ("XIV",), "test": ("XV", "XVI")}
MOST = {"train": 10_000, "dev": 1_000, "test": 2_000}  # windows of a class
LEFT_OUT = "Mito"


def coding(bases: str, known: list[Interval], rng: np.random.Generator) -> Iterator[tuple[str, int]]:
    """Windows side by side that lie inside a coding interval, or outside all."""
    inside = np.zeros((2, len(bases)), dtype=bool)  # of each strand
    for one in known:
        inside[int(one.strand == "-"), one.start : one.end] = True
    for start in range(0, len(bases) - LENGTH, LENGTH):
        window, (plus, minus) = bases[start : start + LENGTH], inside[:, start : start + LENGTH]
        if plus.all() or minus.all():
            yield (window if plus.all() else reverse_complement(window)), 1
        elif not (plus.any() or minus.any()):
            yield (window if rng.random() < 0.5 else reverse_complement(window)), 0


def start(bases: str, known: list[Interval], rng: np.random.Generator) -> Iterator[tuple[str, int]]:
    """Windows around each ATG."""
    first: dict[tuple[str, str], int] = {}  # of each coding sequence, whose exons are intervals of one name
    for one in known:
        place = one.start if one.strand == "+" else len(bases) - one.end
        first[one.name, one.strand] = min(place, first.get((one.name, one.strand), place))
    begins = {(strand, place) for (_, strand), place in first.items()}
    before = LENGTH // 2 - 1
    for strand, text in (("+", bases), ("-", reverse_complement(bases))):
        place = text.find("ATG", before)
        while 0 <= place <= len(text) - LENGTH + before:
            yield text[place - before : place - before + LENGTH], int((strand, place) in begins)
            place = text.find("ATG", place + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yeast", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    (genome,), (annotation,) = given.yeast.glob("*.fa.gz"), given.yeast.glob("*.cds.bed.gz")
    known, rng = list(read_intervals(annotation)), np.random.default_rng(0)
    found: dict[tuple[str, str, int], list[str]] = {}
    for name, bases in chromosomes(genome):
        split = next((split for split, names in SPLITS.items() if name in names), "train")
        for task in (coding, start):
            for window, label in task(bases, [one for one in known if one.seq == name], rng):
                found.setdefault((task.__name__, split, label), []).append(window)
    for task in (coding, start):
        make_folder(given.out / task.__name__)
        for split, most in MOST.items():
            classes = [found[task.__name__, split, label] for label in (0, 1)]
            number = min(most, *map(len, classes))
            drawn = (rng.choice(len(windows), number, replace=False) for windows in classes)
            rows = [(classes[label][i], label) for label, places in enumerate(drawn) for i in places]
            with (given.out / task.__name__ / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("sequence", "label"), *(rows[i] for i in rng.permutation(len(rows)))])
            print(f"{task.__name__:8} {split:6} {len(rows):6} windows")


def chromosomes(genome: Path) -> Iterator[tuple[str, str]]:
    """Name and bases of each, without the mitochondrion."""
    with gzip.open(genome, "rt", encoding="ascii") as file:
        yield from ((record.id, str(record.seq)) for record in SeqIO.parse(file, "fasta") if record.id != LEFT_OUT)


if __name__ == "__main__":
    main()
