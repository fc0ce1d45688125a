"""Does `dna explain` find what a promoter's classifier should look for, and does the gradient agree with mutagenesis?

    LONGSEQ_DATA=... python benchmarks/explain.py [--steps 300] [--name explain]

Trains a small convolutional network on GUE's human core promoters with a TATA box, 70 bases each, the start of
transcription at the 35th, and explains those of the dev set. Rows: the mean importance of each position by both methods
(log-odds of being a promoter; the box is expected 31 to 25 bases before the start, positions 4 to 10 from 0), and the
correlation of both over all bases, with the seconds that they took.
"""

import argparse
import csv
import gzip
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from record import write_result

from seqmodels.tasks.genomics.explain import Explainer, importance
from seqmodels.tasks.genomics.tokens import encode
from seqmodels.tasks.genomics.train import train
from seqmodels.training import TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--name", default="explain")
    arguments = parser.parse_args()
    data = Path(os.environ["LONGSEQ_DATA"]) / "dna" / "gue" / "prom" / "prom_core_tata"
    with gzip.open(data / "dev.csv.gz", "rt") as file:
        promoters = [encode(row["sequence"].encode()) for row in csv.DictReader(file) if row["label"] == "1"]
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(max_steps=arguments.steps, validate_every=50, device="cpu")
        train(
            data, Path(folder) / "run", mixer="cnn", d_model=48, n_layer=4, reverse_complement=False,
            batch_tokens=8960, training=training,
        )  # fmt: skip
        explainer = Explainer(f"{folder}/run/model", "cpu")
    rows, found = [], {}
    for method in (explainer.mutagenesis, explainer.gradient):
        began = time.perf_counter()
        effects = [method(tokens, classes=[1]).scores for tokens in promoters]
        seconds = time.perf_counter() - began
        found[method.__name__] = np.array([importance(changes)[:, 0] for changes in effects])
        means = [round(float(value), 4) for value in found[method.__name__].mean(0)]
        box = {
            "box": round(float(np.mean(means[4:11])), 4),
            "elsewhere": round(float(np.mean(means[:4] + means[11:])), 4),
        }
        rows.append(
            {"method": method.__name__, "promoters": len(promoters), "seconds": round(seconds, 1), **box, "mean": means}
        )
    pairs = list(zip(found["mutagenesis"], found["gradient"], strict=True))
    rows.append(
        {
            "correlation": round(
                float(np.corrcoef(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))[0, 1]), 3
            ),
            "median correlation of a promoter": round(float(np.median([np.corrcoef(a, b)[0, 1] for a, b in pairs])), 3),
        }
    )
    for row in rows:
        print(row)
    print(write_result(arguments.name, rows))


if __name__ == "__main__":
    main()
