"""How well does a model that was pretrained on genomes predict the bases of one that it has not seen, beside counting?

    python benchmarks/pretrain.py GENOMES.fa.gz RUN --name pretrain-genomes -- --validation RECORD

What follows `--` are options of `longseq dna pretrain`; `longseq bench run pretrain --show` has the recorded ones.
"""

import argparse
import csv
import json
from pathlib import Path

import record

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("genomes", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results")
    given, options = record.arguments(parser)
    record.run("dna", "pretrain", given.genomes, given.run, *options)
    with open(max(given.run.glob("logs/*/metrics.csv")), newline="") as file:
        curve = [row for row in csv.DictReader(file) if row["val_bits"]]
    rows = [{"step": int(row["step"]) + 1, "val_bits": round(float(row["val_bits"]), 4)} for row in curve]
    print(record.write_result(given.name, [*rows, json.loads((given.run / "results.json").read_text())]))
