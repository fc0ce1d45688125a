"""Bits per sample of recordings under linear prediction that adapts as it goes: what needs no training.

    python benchmarks/linear_prediction.py $LONGSEQ_DATA/audio/fsdd       # writes results/linear_prediction.json

The same tokens of the same clips as `audio evaluate` has. Recursive least squares, of 24 samples and with each of five
memories, predict the next one; each has logistic distributions about it of 24 widths, cut at the borders of the
tokens. The weight of each of the 120 is what it gave to the past, which counts less the longer ago it is (Herbster and
Warmuth, 1998, fixed share). Nothing is fitted to other clips; the settings were chosen on the validation clips.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import numba
import numpy as np
from record import write_result

from seqmodels.tasks.audio.datasets import lay_out
from seqmodels.tasks.audio.evaluate import Scores
from seqmodels.tasks.audio.tables import open_recordings, split_rows, split_rules
from seqmodels.tasks.audio.waveform import MuLaw

ORDER, KEPT = 24, (0.98, 0.99, 0.995, 0.998, 0.9995)  # samples; share of the past that a step keeps, for each memory
WIDTHS = 2.0 ** np.arange(-13, -1, 0.5)  # of the logistic distributions
SHARE = 0.01  # of the weights that each step gives back to all alike


def borders(levels: int) -> np.ndarray:
    """Samples (levels + 1,) between which the tokens lie; the outermost at infinity."""
    companded = 2 * (np.arange(levels + 1) - 0.5) / (levels - 1) - 1
    found = np.sign(companded) * np.expm1(np.abs(companded) * math.log(levels)) / (levels - 1)
    found[0], found[-1] = -np.inf, np.inf
    return found


@numba.njit(cache=True)
def bits_of(tokens, samples, edges, kept, widths, order, share):
    """Bits of all tokens (l,) of a clip, whose decoded samples (l,) are what is predicted from."""
    m, k = len(kept), len(widths)
    past = np.zeros(order)
    filters, inverse = np.zeros((m, order)), np.zeros((m, order, order))
    for i in range(m):
        for j in range(order):
            inverse[i, j, j] = 100.0
    weights, bits = np.full((m, k), 1.0 / (m * k)), 0.0
    gain = np.empty(order)
    for t in range(len(tokens)):
        low, high = edges[tokens[t]], edges[tokens[t] + 1]
        total = 0.0
        for i in range(m):
            center = 0.0
            for j in range(order):
                center += filters[i, j] * past[j]
            for j in range(k):
                p = logistic(high, center, widths[j]) - logistic(low, center, widths[j])
                weights[i, j] *= max(p, 1e-12)
                total += weights[i, j]
        bits -= math.log2(total)
        for i in range(m):
            for j in range(k):
                weights[i, j] = (1 - share) * weights[i, j] / total + share / (m * k)
            power = kept[i]
            for a in range(order):
                gain[a] = 0.0
                for b in range(order):
                    gain[a] += inverse[i, a, b] * past[b]
                power += gain[a] * past[a]
            error = samples[t]
            for a in range(order):
                error -= filters[i, a] * past[a]
            for a in range(order):
                filters[i, a] += gain[a] / power * error
                for b in range(order):
                    inverse[i, a, b] = (inverse[i, a, b] - gain[a] * gain[b] / power) / kept[i]
            trace = 0.0
            for a in range(order):
                trace += inverse[i, a, a]
            if trace > 1e9:  # silence tells nothing, and what is known must not be forgotten without end
                for a in range(order):
                    for b in range(order):
                        inverse[i, a, b] *= 1e9 / trace
        for a in range(order - 1, 0, -1):
            past[a] = past[a - 1]
        past[0] = samples[t]
    return bits


@numba.njit(cache=True)
def logistic(x, center, width):
    return 0.5 * (1 + math.tanh((x - center) / (2 * width)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="recordings")
    parser.add_argument("--validation", help="a rule such as index=5-9: measures these instead, and writes nothing")
    parser.add_argument("--name", default="linear_prediction")
    options = parser.parse_args()
    recordings, mu_law = open_recordings(options.data, None), MuLaw()
    parts = split_rows(recordings.rows, **split_rules(recordings.rows, None, options.validation), seed=0)
    chosen = recordings.select(parts["validation" if options.validation else "test"])
    clips = lay_out(chosen.read(mu_law.sample_rate), mu_law)
    edges, found = borders(mu_law.levels), []
    for start, length in zip(clips.offsets[0], clips.lengths[0], strict=True):
        tokens = clips.tokens(clips.samples[start + 1 : start + length])
        decoded = mu_law.decode(tokens).astype(np.float64)
        found.append(bits_of(tokens, decoded, edges, np.array(KEPT), WIDTHS, ORDER, SHARE))
    scores = Scores(np.array(found), clips.lengths[0] - 1, np.zeros(len(clips)))
    row: dict[str, Any] = {
        "what": "linear prediction", "order": ORDER, "clips": len(clips), "samples": int(scores.samples.sum()),
        "bits_per_sample": scores.bits_per_sample(), "interval_95": scores.interval(),
    }  # fmt: skip
    if "speaker" in chosen.rows.columns:
        speakers = chosen.rows["speaker"].to_numpy()
        row["by speaker"] = {name: scores.bits_per_sample(speakers == name) for name in sorted(set(speakers))}
        row["bits_per_sample without one speaker"] = {
            name: scores.bits_per_sample(speakers != name) for name in sorted(set(speakers))
        }
    print(row)
    if not options.validation:
        write_result(options.name, [row])


if __name__ == "__main__":
    main()
