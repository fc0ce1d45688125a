"""One recipe on the tasks of GUE: the Matthews correlation on dev and test, mean and spread over its models.

    python benchmarks/gue.py $LONGSEQ_DATA/dna/gue runs/gue-kmer --name gue-kmer -- --baseline kmer
    python benchmarks/gue.py data/nt runs/nt --name nt-caduceus -- --strands conjoined --seeds 10

Other collections of `longseq dna data` likewise, which show accuracy or F1 (here its mean over the classes).

What follows `--` are options of `longseq dna train`, the same for all tasks; --test is added unless --no-test is given,
so that a recipe can be chosen on dev. What follows a second `--` are options with which one model is first trained on
all tasks together (gue_joint.py), from which each then starts. A command that was stopped goes on after the last task
with results. `longseq bench run gue --size gpu --show` has the recipes behind the table.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import record

from seqmodels.cli import main
from seqmodels.tasks.genomics.labelled import splits_of


def tasks(folder: Path) -> list[str]:
    """The tasks that are there, by the folders with their splits."""
    places = (path.parent for path in folder.rglob("train*"))
    found = {place.parent if place.name == "data" and place != folder else place for place in places}
    return sorted(str(place.relative_to(folder)) for place in found if "train" in splits_of(place))


def measured(task: str, data: Path, run: Path, words: list[str]) -> dict:
    """Trains on a task, unless it is done, and gives a row of figures."""
    place, started = run / task, time.perf_counter()
    if not (place / "results.json").exists() and main(["dna", "train", str(data / task), str(place), *words]):
        sys.exit(2)
    results = json.loads((place / "results.json").read_text())
    row: dict = {"task": task, "models": len(results["models"])}
    for figures in results["summary"]:
        on, metric = figures["measured on"], figures["metric"]
        if metric == "mcc":
            row |= {f"{on}_mcc": figures["mean"], f"{on}_spread": figures["spread"], f"{on}_values": figures["values"]}
        elif metric in ("accuracy", "macro_f1"):
            row |= {f"{on}_{metric}": figures["mean"], f"{on}_{metric}_spread": figures["spread"]}
    return row | {"records": results["models"][0]["records"], "seconds": round(time.perf_counter() - started, 1)}


def together(data: Path, run: Path, words: list[str]) -> str:
    """The folder of a model of all tasks, which is trained unless that is done."""
    from gue_joint import write  # which imports this file

    place = run / "joint"
    if not (place / "results.json").exists():
        write(data, run / "joint-table")
        if main(["dna", "train", str(run / "joint-table"), str(place), "--targets", "multi", *words]):
            sys.exit(2)
    return str(place / "model")


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results")
    parser.add_argument("--no-test", action="store_true")
    own, options, first = [*" ".join(sys.argv[1:]).split(" -- "), "", ""][:3]
    given = parser.parse_args(own.split())
    words = options.split() + ([] if given.no_test else ["--test"])
    if first:
        words += ["--start-from", together(given.data, given.run, first.split())]
    rows = [measured(task, given.data, given.run, words) for task in tasks(given.data)]
    means = {key: sum(row[key] for row in rows) / len(rows) for key in ("dev_mcc", "test_mcc") if key in rows[0]}
    rows.append({"task": "mean", **means})
    print(
        *(f"{r['task']:24} " + " ".join(f"{k} {v:.4f}" for k, v in r.items() if k.endswith("mcc")) for r in rows),
        sep="\n",
    )
    print(record.write_result(given.name, rows))


if __name__ == "__main__":
    measure()
