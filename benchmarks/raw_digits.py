"""Digits told from raw samples: classifiers of several seeds on the official test recordings, as JSON.

    python benchmarks/raw_digits.py $LONGSEQ_DATA/audio/fsdd runs/raw_digits --name raw_digits -- \
        --start-from spoken-digits --clips.noise 5 --clips.mask 0.1

What follows `--` are options of `longseq audio train`, to which --classify word and the validation recordings (indices
5 to 9) are added. Weights are chosen on those; the test recordings are looked at once by each model. What was trained
before, in the same folder, is not trained again.
"""

import argparse
import json
from pathlib import Path

import record

KEPT = ("weights_sha256", "n", "metrics", "per_class", "confusion", "classes")  # of what `audio evaluate` writes


def measured(data: Path, folder: Path, seed: int, words: list[str]) -> dict:
    """The row of one seed."""
    if not (folder / "model" / "model.safetensors").exists():
        words = ["--classify", "word", "--clips.validation", "index=5-9", *words]
        record.run("audio", "train", data, folder, *words, "--clips.seed", seed, "--training.seed", seed)
    record.run("audio", "evaluate", data, "--model", folder / "model", "--output", folder / "test.json")
    found = json.loads((folder / "test.json").read_text())
    return {"seed": seed, **{name: found[name] for name in KEPT}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results")
    parser.add_argument("--seeds", type=int, default=3)
    given, options = record.arguments(parser)
    rows = [measured(given.data, given.run / f"seed{s}", s, options) for s in range(given.seeds)]
    for row in rows:
        accuracy = row["metrics"]["accuracy"]
        print(f"seed {row['seed']}: {accuracy['value']:.4f} ({accuracy['low']:.4f} to {accuracy['high']:.4f})")
    print(record.write_result(given.name, rows))
