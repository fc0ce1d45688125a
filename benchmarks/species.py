"""Which species is a contig of a strain never trained on? The accuracy of a model against the length of the contig.

    python benchmarks/species.py $LONGSEQ_DATA/genomes/enterobacteria

As many windows of each class at each length, evenly spaced over the test records, with bootstrapped intervals: what
`dna evaluate` says, recorded with machine, versions and commit. Beside it, on the same windows, what counting in the
training records gives: a Markov chain of order 7 for each class, both strands, add-one; and the class whose records
hold most of the window's words of 12 bases, or of 14, on either strand.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from record import write_result

from seqmodels.metrics import evaluate_scores
from seqmodels.tasks.genomics.datasets import Stretch, spaced_windows, taken
from seqmodels.tasks.genomics.evaluate import evaluate
from seqmodels.tasks.genomics.labelled import load_labelled
from seqmodels.tasks.genomics.markov import count_words, words_of
from seqmodels.tasks.genomics.tokens import Tokens, reverse_complement

LENGTHS = (1024, 4096, 8192, 16384, 65536, 262144, 524288, 1048576)
ORDER, WORDS = 7, (12, 14)
Scores = Callable[[Tokens], NDArray[np.float64]]


def chains(classes: list[list[Tokens]]) -> Scores:
    """The probability of each class (n,) for a sequence, by Markov chains of the classes' sequences."""
    counts = np.stack([count_words(own, ORDER + 1) for own in classes]).reshape(len(classes), -1, 4)
    nats = np.log((counts + 1) / (counts.sum(-1, keepdims=True) + 4)).reshape(len(classes), -1)

    def scores(sequence: Tokens) -> NDArray[np.float64]:
        total = nats[:, words_of(sequence, ORDER + 1)].sum(1)
        found = np.exp(total - total.max())
        return found / found.sum()

    return scores


def votes(classes: list[list[Tokens]], k: int) -> Scores:
    """The share of a sequence's words of k bases that each class (n,) holds, scaled to a sum of 1."""
    held = np.zeros((len(classes), 4**k), dtype=bool)
    for own, sequences in zip(held, classes, strict=True):
        for tokens in sequences:
            for strand in (tokens, reverse_complement(tokens)):
                own[words_of(strand, k)] = True

    def scores(sequence: Tokens) -> NDArray[np.float64]:
        found = held[:, words_of(sequence, k)].sum(1) + 1e-9
        return found / found.sum()

    return scores


def counted(data: Path, lengths: list[int], windows: int) -> Iterator[dict[str, Any]]:
    """What counting gives, a row for each length and way."""
    train = load_labelled(data, split="train")
    test = load_labelled(data, split="test", classes=train.classes)
    own = [
        [tokens for tokens, label in zip(train.tokens, train.labels, strict=True) if label == k]
        for k in range(len(train.classes))
    ]
    whole = [Stretch(i, 0, len(tokens)) for i, tokens in enumerate(test.tokens)]
    ways = {f"Markov chain of order {ORDER}": chains(own), **{f"vote of {k}-mers": votes(own, k) for k in WORDS}}
    for length in lengths:
        sequences, targets = taken(test, spaced_windows(test, whole, length, windows, overlap=False))
        for name, scores in ways.items():
            found = evaluate_scores(targets, np.stack([scores(sequence) for sequence in sequences]))
            accuracy = found["metrics"]["accuracy"]
            yield {"counting": name, "window": length, "n": len(targets), "accuracy": accuracy}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="genomes with a metadata.csv")
    parser.add_argument("--model", default="enterobacteria")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--windows", type=int, default=240, help="of each class and length, at most")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--name", default="enterobacteria", help="of the file in benchmarks/results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        evaluate(
            given.model, data=given.data, window=list(given.lengths), windows=given.windows, output=report,
            device=given.device,
        )  # fmt: skip
        rows = json.loads(report.read_text())["results"]
    rows += counted(given.data, list(given.lengths), given.windows)
    print(write_result(given.name, rows))
