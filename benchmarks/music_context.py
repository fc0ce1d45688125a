"""Bits per sample of music against the length of context that a model is trained with.

    longseq audio render shared/data/audio/jsb_chorales/Jsb16thSeparated.json.gz music --workers 16
    python benchmarks/music_context.py music RUNS [--lengths 8192 ... 983040] [--samples 500000000]

One model for each length: the same recipe, the same samples per step (one recording of the longest length, or as many
shorter pieces), the same number of samples in all. Its bits per sample of the test recordings are given twice: read in
pieces of the length it was trained with, each from an empty state, as in the Mamba paper's figure of YouTubeMix (2023,
section 4.4); and read whole, the state carried through the minute. Rows go to results/GPU/music_context.json, one for
each length, so that lengths can be run one by one.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import record

from seqmodels.tasks.audio.backbones import Block
from seqmodels.tasks.audio.commands import evaluate
from seqmodels.tasks.audio.train import DataConfig, train
from seqmodels.training import TrainingConfig

LENGTHS = (8192, 30720, 122880, 491520, 983040)  # the last is a whole minute at 16 kHz


def bits(music: Path, model: Path, context: int, options: argparse.Namespace) -> dict[str, Any]:
    """What `audio evaluate` says of the test recordings."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bits.json"
        evaluate(
            music, model=str(model), context=context, output=output, batch_tokens=options.step, device=options.device
        )
        return json.loads(output.read_text())


def one(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures the model of one length."""
    steps, run = max(1, round(options.samples / options.step)), options.runs / f"{length}"
    started = time.perf_counter()
    train(
        options.music, run,
        clips=DataConfig(sample_rate=options.rate, batch_tokens=options.step, longest=length, speed_change=0),
        training=TrainingConfig(
            max_steps=steps, learning_rate=options.learning_rate, precision=options.precision, device=options.device,
            validate_every=max(1, steps // 4), seed=options.seed, recompute=options.recompute,
        ),
        widths=tuple(options.widths), depths=tuple(options.depths), pools=tuple(options.pools), outer=options.outer,
        dropout=0.0,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    pieces, whole = bits(options.music, run / "model", length, options), bits(options.music, run / "model", 0, options)
    return {
        "op": "music_context", "l": length,
        "shape": f"{options.outer} {options.widths} {options.depths} {options.pools}",
        "dtype": options.precision, "seed": options.seed, "steps": steps, "samples per step": options.step,
        "seconds with reading": round(seconds, 1), "recordings": pieces["clips"],
        "bits per sample, pieces": pieces["bits_per_sample"], "pieces interval_95": pieces["interval_95"],
        "bits per sample, whole": whole["bits_per_sample"], "whole interval_95": whole["interval_95"],
        **record.origin(options.commit),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("music", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--samples", type=int, default=500_000_000, help="to train on, in all")
    parser.add_argument("--step", type=int, default=983_040, help="samples per step")
    parser.add_argument("--rate", type=int, default=16000)
    parser.add_argument("--widths", type=int, nargs="+", default=(64, 128, 256))
    parser.add_argument("--depths", type=int, nargs="+", default=(3, 3, 3))
    parser.add_argument("--pools", type=int, nargs="+", default=(16, 16))
    parser.add_argument("--outer", choices=Block.__args__, default="mamba2")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--precision", choices=("32", "bf16"), default="bf16")
    parser.add_argument("--recompute", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    for length in options.lengths:
        row = one(length, options)
        print(json.dumps(row), flush=True)
        print(record.write_rows("music_context", [row]))


if __name__ == "__main__":
    main()
