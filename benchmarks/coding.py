"""Coding or not, per base: learned from E. coli K-12, measured on stretches held out of it and on yeast.

    python benchmarks/coding.py runs/coding-codons --name coding-codons -- --baseline codons

The data are those of genomes/enterobacteria and genomes/yeast_s288c in $LONGSEQ_DATA (or --data). What follows `--`
are options of `longseq dna train`. Weights are chosen on one tenth of E. coli (VALIDATION); another one (TEST) and the
whole of yeast are looked at unless --no-test is given, so that a recipe can be chosen before. Beside the F1 of coding
bases stands that of calling every base coding. What was trained before, in the same folder, is not trained again.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import record

ECOLI = "enterobacteria/ecoli_K12_MG1655.fa.gz", "enterobacteria/ecoli_K12_MG1655.cds.bed.gz"
YEAST = "yeast_s288c/S288C_R64-1-1.fa.gz", "yeast_s288c/S288C.cds.bed.gz"
VALIDATION, TEST = "NC_000913.3:3700001-4160000", "NC_000913.3:4160001-4641652"
METRICS = ("f1", "precision", "recall", "mcc", "auroc")


def row(on: str, results: list[dict]) -> dict:
    """Mean, spread and values over models of what was measured on something."""
    found: dict = {"on": on, "models": len(results), "bases": results[0]["bases"]}
    coding = found["bases"]["CDS"] / results[0]["n"]
    found["f1_of_all_coding"] = 2 * coding / (1 + coding)
    for metric in METRICS:
        values = [result["metrics"][f"CDS {metric}"]["value"] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else None
        found |= {metric: statistics.fmean(values), f"{metric}_spread": spread, f"{metric}_values": values}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results")
    parser.add_argument("--data", type=Path, default=os.environ.get("LONGSEQ_DATA"), help="otherwise $LONGSEQ_DATA")
    parser.add_argument("--no-test", action="store_true")
    given, options = record.arguments(parser)
    if given.data is None:
        parser.error("name the folder of data with --data or LONGSEQ_DATA")
    genomes, started = given.data / "genomes", time.perf_counter()
    more = ([] if given.no_test else ["--test"]) + ["--training.resume"] * (given.run / "results.json").exists()
    record.run("dna", "train", genomes / ECOLI[0], given.run, "--annotation", genomes / ECOLI[1], "--validation",
               VALIDATION, "--leave-out", TEST, *more, *options)  # fmt: skip
    seconds = time.perf_counter() - started
    models = json.loads((given.run / "results.json").read_text())["models"]
    measured = {on: [model["results"][on][0] for model in models] for on in models[0]["results"]}
    if not given.no_test:
        measured["yeast"] = []
        for model in models:
            folder, report = (given.run if len(models) == 1 else given.run / model["folder"]), "yeast.json"
            record.run("dna", "evaluate", folder / "model", "--data", genomes / YEAST[0], "--annotation",
                       genomes / YEAST[1], "--output", folder / report)  # fmt: skip
            measured["yeast"] += json.loads((folder / report).read_text())["results"]
    rows = [row(on, results) for on, results in measured.items()]
    for r in rows:
        values = "  ".join(f"{m} {r[m]:.4f}" for m in METRICS)
        print(f"{r['on']:6} {values}  (all coding: f1 {r['f1_of_all_coding']:.4f})")
    print(record.write_result(given.name, [*rows, {"seconds_of_training": round(seconds, 1)}]))
