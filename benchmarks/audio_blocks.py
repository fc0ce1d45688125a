"""Which blocks are good where? The U-Net of sound with other blocks outside and at its centre, at an equal budget.

    python benchmarks/audio_blocks.py DATA RUNS [--pairs mamba/mamba s4d/mamba ...] [--samples 60000000]

As the Mamba paper's Table 5 (2023), on any recordings: every pair OUTER/CENTRE is trained on the same samples in the
same order with the same recipe, its widths the same, and measured on the test recordings, told the labels. Parameters
and seconds of training differ and are given. Rows go to results/GPU/audio_blocks.json, one for each pair and seed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import record

import seqmodels
from seqmodels.tasks.audio.commands import evaluate
from seqmodels.tasks.audio.train import DataConfig, train
from seqmodels.training import TrainingConfig

PAIRS = (
    "mamba/mamba", "mamba/s4d", "mamba/attention", "s4d/mamba", "s4d/s4d", "s4d/attention", "mamba2/mamba2",
    "mamba2/s4d", "mamba2/attention", "s4d/mamba2",
)  # fmt: skip


def one(pair: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one pair."""
    outer, centre = pair.split("/")
    steps, run = max(1, round(options.samples / options.step)), options.runs / f"{outer}-{centre}-{seed}"
    started = time.perf_counter()
    train(
        options.data, run,
        clips=DataConfig(
            conditions=options.conditions, validation=options.validation, batch_tokens=options.step, seed=seed
        ),
        training=TrainingConfig(
            max_steps=steps, learning_rate=options.learning_rate, precision=options.precision, device=options.device,
            validate_every=max(1, steps // 4), seed=seed, keep="last", ema_decay=0.99,
        ),
        widths=tuple(options.widths), depths=tuple(options.depths), pools=tuple(options.pools),
        outer=outer, centre=centre, window=options.window, dropout=0.1,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bits.json"
        evaluate(
            options.data, model=str(run / "model"), validation=options.validation, output=output, device=options.device
        )
        found = json.loads(output.read_text())
    parameters = sum(p.numel() for p in seqmodels.load(str(run / "model")).parameters())
    return {
        "op": "audio_blocks", "impl": pair, "shape": f"{options.widths} {options.depths} {options.pools} seed {seed}",
        "dtype": options.precision, "parameters": parameters, "steps": steps, "samples per step": options.step,
        "seconds with reading": round(seconds, 1), "bits_per_sample": found["bits_per_sample"],
        "interval_95": found["interval_95"], **record.origin(options.commit),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--pairs", nargs="+", default=PAIRS, help="OUTER/CENTRE, of the blocks of audio train --outer")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--samples", type=int, default=60_000_000, help="to train on, in all")
    parser.add_argument("--step", type=int, default=131_072, help="samples per step, padding included")
    parser.add_argument("--conditions", default="digit=word,speaker")
    parser.add_argument("--validation", default="index=5-9")
    parser.add_argument("--widths", type=int, nargs="+", default=(64, 128, 256))
    parser.add_argument("--depths", type=int, nargs="+", default=(4, 4, 4))
    parser.add_argument("--pools", type=int, nargs="+", default=(4, 4))
    parser.add_argument("--window", type=int, default=0, help="steps that attention sees; 0: all")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--precision", choices=("32", "bf16"), default="bf16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    for seed in options.seeds:
        for pair in options.pairs:
            row = one(pair, seed, options)
            print(json.dumps(row), flush=True)
            print(record.write_rows("audio_blocks", [row]))


if __name__ == "__main__":
    main()
