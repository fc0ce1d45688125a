"""Makes contigs.fa.gz: simulated contigs of five species of bacteria, not pieces of any genome.

Each contig is drawn from a Markov chain of order 11 whose statistics are those of one species' training chromosome,
both strands counted, so that a classifier of words has something to find. A context occurs about twice in a genome, so
that the chain seldom follows one place for long: 2 % of its windows of 20 bases are in the chromosome. Some bases are
set in lower case and some runs to N and to codes such as R, as in real assemblies. Run it with the folder of data in
LONGSEQ_DATA:

    LONGSEQ_DATA=... python examples/make_contigs.py
"""

import gzip
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqmodels.tasks.genomics.labelled import load_labelled
from seqmodels.tasks.genomics.tokens import A, T, decode, reverse_complement

ORDER = 11
UNSEEN = 0.02  # count of what never follows a context
LENGTHS = (2_000, 5_000, 10_000, 20_000, 40_000, 60_000)
CONTIGS = 12
SEED = 1


def transitions(strands: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
    """Cumulative probabilities (4**ORDER, 4) of the base after each ORDER bases."""
    counts = np.full(4 ** (ORDER + 1), UNSEEN)
    for tokens in strands:
        known = (tokens >= A) & (tokens <= T)
        bases = np.where(known, tokens - A, 0).astype(np.int32)
        n = len(bases) - ORDER
        words, usable = np.zeros(n, dtype=np.int32), np.ones(n, dtype=bool)
        for k in range(ORDER + 1):  # a context and what follows it
            words = words * 4 + bases[k : k + n]
            usable &= known[k : k + n]
        counts += np.bincount(words[usable], minlength=len(counts))
    counts = counts.reshape(-1, 4)
    return np.cumsum(counts / counts.sum(1, keepdims=True), axis=1)


def draw(chain: NDArray[np.float64], length: int, rng: np.random.Generator) -> str:
    """A sequence of `length` bases from the chain, begun at a random context and run in for 1,000 bases."""
    context, bases = int(rng.integers(len(chain))), []
    for uniform in rng.random(length + 1000):
        base = min(int(np.searchsorted(chain[context], uniform, side="right")), 3)
        bases.append(base)
        context = (context * 4 + base) % len(chain)
    return decode(np.array(bases[1000:], dtype=np.uint8) + A)


def main() -> None:
    """Writes contigs.fa.gz beside this file."""
    folder = Path(os.environ["LONGSEQ_DATA"]) / "genomes" / "enterobacteria"
    records = load_labelled(folder, split="train")
    rng = np.random.default_rng(SEED)
    lines: list[str] = []
    chains = [transitions([tokens, reverse_complement(tokens)]) for tokens in records.tokens]
    for i in range(CONTIGS):
        which = i % len(chains)
        species = records.classes[records.labels[which]]
        sequence = draw(chains[which], LENGTHS[i % len(LENGTHS)], rng)
        for _ in range(int(rng.integers(3))):  # what a repeat masker and a scaffolder leave behind
            start, size = int(rng.integers(len(sequence))), int(rng.integers(50, 500))
            sequence = sequence[:start] + sequence[start : start + size].lower() + sequence[start + size :]
        if i % 3 == 2:
            start = int(rng.integers(len(sequence) - 200))
            sequence = sequence[:start] + "N" * 100 + "RYK" + sequence[start + 103 :]
        name = f"simulated_{species.replace(' ', '_')}_{i // len(chains) + 1}"
        lines.append(f">{name} order-{ORDER} Markov chain of {species}, {len(sequence)} bases")
        lines += [sequence[j : j + 80] for j in range(0, len(sequence), 80)]
    text = ("\n".join(lines) + "\n").encode()
    target = Path(__file__).with_name("contigs.fa.gz")
    target.write_bytes(gzip.compress(text, compresslevel=9, mtime=0))
    print(f"{target}: {CONTIGS} contigs, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
