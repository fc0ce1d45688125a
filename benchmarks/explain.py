"""Does `dna explain` find what a promoter's classifier should look for, and does the gradient agree with mutagenesis?

    python benchmarks/explain.py $LONGSEQ_DATA/dna/gue/prom/prom_core_tata [--steps 200] [--name explain]

Trains a small convolutional network on GUE's human core promoters with a TATA box, 70 bases each, the start of
transcription at the 35th, and explains those of the test set, all whose label is promoter. Rows: the mean importance of
each position by both methods (log-odds of being a promoter; the box is expected 31 to 25 bases before the start,
positions 4 to 10 from 0), and the correlation of both over all bases.
"""

import argparse
import csv
import gzip
import tempfile
from pathlib import Path

import numpy as np
from record import write_result

from seqmodels.tasks.genomics.importance import Explainer, importance
from seqmodels.tasks.genomics.tokens import encode
from seqmodels.tasks.genomics.train import train
from seqmodels.training import TrainingConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the task")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--name", default="explain")
    arguments = parser.parse_args()
    data = arguments.data
    with gzip.open(data / "test.csv.gz", "rt") as file:
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
        effects = [method(tokens, classes=[1]).scores for tokens in promoters]
        found[method.__name__] = np.array([importance(changes)[:, 0] for changes in effects])
        mean = found[method.__name__].mean(0)
        box, elsewhere = (round(float(part.mean()), 4) for part in (mean[4:11], np.delete(mean, slice(4, 11))))
        row = {"method": method.__name__, "promoters": len(promoters), "box": box, "elsewhere": elsewhere}
        rows.append(row | {"mean": [round(float(value), 4) for value in mean]})
    exact, linear = found.values()
    overall = float(np.corrcoef(exact.ravel(), linear.ravel())[0, 1])
    median = float(np.median([np.corrcoef(a, b)[0, 1] for a, b in zip(exact, linear, strict=True)]))
    rows.append({"correlation": round(overall, 3), "median correlation of a promoter": round(median, 3)})
    for row in rows:
        print(row)
    print(write_result(arguments.name, rows))


if __name__ == "__main__":
    main()
