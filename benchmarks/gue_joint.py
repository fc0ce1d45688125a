"""One table of all tasks of GUE for training them together: the train splits, each task a column, and the dev splits.

    python benchmarks/gue_joint.py $LONGSEQ_DATA/dna/gue runs/gue-joint
    longseq dna train runs/gue-joint runs/joint --targets multi ...

Left out of train is what shares 24 bases in a row, on either strand, with a dev or test sequence of any task: windows
of different tasks overlap in the genome, and would tell of each other's answers. A sequence of several tasks has
several labels, each 0 or 1; tasks of more classes cannot be trained together with others.
"""

import argparse
import sys
from pathlib import Path

import polars
from Bio.Seq import reverse_complement
from gue import tasks

from seqmodels.errors import InputError

SHARED = 24


def read(folder: Path, task: str, split: str) -> polars.DataFrame:
    """The columns sequence (in capitals) and label_<task> of one split."""
    (path,) = (folder / task).glob(f"{split}.csv*")
    table = polars.read_csv(path)
    if not table["label"].is_in([0, 1]).all():
        raise InputError(f"{path} has other labels than 0 and 1; give a folder of tasks of two classes")
    return table.select(polars.col("sequence").str.to_uppercase(), polars.col("label").alias(f"label_{task}"))


def joined(folder: Path, names: list[str], split: str) -> polars.DataFrame:
    """A row per sequence, with a column per task, empty where the task does not have it."""
    table = polars.concat([read(folder, task, split) for task in names], how="diagonal")
    return table.group_by("sequence", maintain_order=True).agg(polars.all().drop_nulls().first())


def words(text: str) -> set[str]:
    """All windows of SHARED bases, as they stand."""
    return {text[i : i + SHARED] for i in range(len(text) - SHARED + 1)}


def apart(sequences: polars.Series, held: polars.Series) -> polars.Series:
    """Which sequences share no window, on either strand, with any of those held out."""
    known = set[str]().union(*map(words, held))
    return polars.Series([known.isdisjoint(words(text) | words(reverse_complement(text))) for text in sequences])


def write(data: Path, out: Path) -> None:
    """train.csv and dev.csv of all tasks in `data`."""
    names = tasks(data)
    train, dev, test = (joined(data, names, split) for split in ("train", "dev", "test"))
    kept = train.filter(apart(train["sequence"], polars.concat([dev["sequence"], test["sequence"]])))
    out.mkdir(parents=True, exist_ok=True)
    kept.write_csv(out / "train.csv")
    dev.write_csv(out / "dev.csv")
    print(f"{len(kept):,} of {len(train):,} training sequences are apart from all of dev and test", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    write(given.data, given.out)


if __name__ == "__main__":
    main()
