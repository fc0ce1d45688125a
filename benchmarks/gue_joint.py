"""One table of all tasks of GUE for training them together: the train splits, each task a column, and the dev splits.

    python benchmarks/gue_joint.py $LONGSEQ_DATA/dna/gue runs/gue-joint
    longseq dna train runs/gue-joint runs/joint --targets multi ...

Left out of train is what shares 24 bases in a row, on either strand, with a dev or test sequence of any task: windows
of different tasks overlap in the genome, and would tell of each other's answers. A sequence of several tasks has
several labels.
"""

import argparse
import sys
from pathlib import Path

import polars
from Bio.Seq import reverse_complement
from gue import tasks

SHARED = 24


def read(folder: Path, task: str, split: str) -> polars.DataFrame:
    """The columns sequence and label_<task> of one split."""
    (path,) = (folder / task).glob(f"{split}.csv*")
    return polars.read_csv(path).rename({"label": f"label_{task}"})


def words(sequences: polars.Series) -> set[str]:
    """All windows of SHARED bases, as they stand."""
    return {text[i : i + SHARED] for text in sequences for i in range(len(text) - SHARED + 1)}


def joined(folder: Path, names: list[str], split: str) -> polars.DataFrame:
    """A row per sequence, with a column per task, empty where the task does not have it."""
    table = polars.concat([read(folder, task, split) for task in names], how="diagonal")
    return table.group_by("sequence", maintain_order=True).agg(polars.all().drop_nulls().first())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    names = tasks(given.data)
    train, dev = (joined(given.data, names, split) for split in ("train", "dev"))
    held = words(polars.concat([dev["sequence"], joined(given.data, names, "test")["sequence"]]))
    apart = [held.isdisjoint(words([text, reverse_complement(text)])) for text in train["sequence"]]
    given.out.mkdir(parents=True, exist_ok=True)
    train.filter(polars.Series(apart)).write_csv(given.out / "train.csv")
    dev.write_csv(given.out / "dev.csv")
    print(f"{sum(apart):,} of {len(apart):,} training sequences are apart from all of dev and test", file=sys.stderr)
