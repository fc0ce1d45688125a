"""Do a model's scores tell common from rare variants? AUROC with intervals, on one VCF with allele frequencies.

    python benchmarks/variants.py Z.vcf.gz Z.fa.gz MODEL... [--context 1024] [--device auto] [--name variants]

Common: frequency of at least 5 %, rare: below 1 %; single bases only, transitions and transversions also by themselves,
since they differ in frequency. Larger llr and smaller distance should mean common. Beside the models stands
`transition` (1 or 0). The intervals resample the variants (1,000 times, 95 %); neighbours are not independent, so that
they are rather too narrow.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
from record import write_result
from sklearn.metrics import roc_auc_score

from seqmodels.tasks.genomics.variants import variants

_TRANSITIONS = {("A", "G"), ("G", "A"), ("C", "T"), ("T", "C")}


def auroc(common: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """AUROC and its bootstrap interval."""
    rng, values = np.random.default_rng(0), [roc_auc_score(common, score)]
    for _ in range(1000):
        drawn = rng.integers(len(common), size=len(common))
        values.append(roc_auc_score(common[drawn], score[drawn]))
    found = (values[0], *np.percentile(values[1:], (2.5, 97.5)))
    return {name: round(float(value), 4) for name, value in zip(("auroc", "low", "high"), found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vcf", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="variants")
    arguments = parser.parse_args()
    rows = []
    for i, model in enumerate(arguments.models):
        with tempfile.TemporaryDirectory() as folder:
            table = Path(folder) / "scores.tsv"
            variants(
                arguments.vcf, arguments.reference, model, table, context=arguments.context, info="AF",
                device=arguments.device,
            )  # fmt: skip
            with open(table) as file:
                scored = [row for row in csv.DictReader(file, delimiter="\t") if row["kind"] == "snv" and row["llr"]]
        frequency = np.array([float(row["AF"]) for row in scored])
        kept = (frequency >= 0.05) | (frequency < 0.01)
        transition = np.array([(row["ref"], row["alt"]) in _TRANSITIONS for row in scored])
        scores = {
            "llr": [float(row["llr"]) for row in scored],
            "minus distance": [-float(row["distance"]) for row in scored],
        }
        columns = {f"{name} of {model}": np.array(values) for name, values in scores.items()}
        if i == 0:
            columns["transition"] = transition.astype(float)
        for name, values in columns.items():
            for of, part in (("all", kept), ("transitions", kept & transition), ("transversions", kept & ~transition)):
                if of == "all" or name != "transition":
                    common = frequency[part] >= 0.05
                    counts = {"common": int(common.sum()), "rare": int((~common).sum())}
                    rows.append({"score": name, "of": of, **counts, **auroc(common, values[part])})
                    print(rows[-1], flush=True)
    print(write_result(arguments.name, rows))


if __name__ == "__main__":
    main()
