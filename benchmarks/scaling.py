"""Times training steps on one sequence against its length: Mamba, Mamba-2, full and windowed attention, LSTM.

    python benchmarks/scaling.py                                      # writes results/GPU/scaling.json
    python benchmarks/scaling.py --device cpu --lengths 1024 --mixers mamba2 --layers 1     # only prints

8 layers of width 256, one label per sequence, batch 1, weights in float32, autocast to bfloat16. A step is loss,
backward and AdamW; `ms` is the median, `peak_gb` all of its memory. A mixer's lengths end where it runs out of memory
or a step takes more than --most seconds. --recompute keeps the activations of so many tokens at a time.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor

import seqmodels
from seqmodels.backbone import recompute_layers
from seqmodels.config import BackboneConfig, HeadConfig, ModelConfig
from seqmodels.heads import Model
from seqmodels.presets import attention, lstm, mamba, mamba2

LENGTHS = tuple(1 << k for k in range(10, 23))
WARM_UP, STEPS = 2, 5
D_MODEL, LETTERS = 256, 4
MIXERS = {
    "mamba2": lambda layers: mamba2(D_MODEL, layers, d_state=64),
    "mamba": lambda layers: mamba(D_MODEL, layers),
    "attention": lambda layers: attention(D_MODEL, layers, num_heads=4),
    "window-1024": lambda layers: attention(D_MODEL, layers, num_heads=4, window=1024),
    "lstm": lambda layers: lstm(D_MODEL, layers),
}


def classifier(backbone: BackboneConfig) -> Model:
    """With one label per sequence of letters."""
    head = HeadConfig(task="sequence", labels=tuple("abcde"))
    return seqmodels.build(ModelConfig(vocab_size=LETTERS, backbone=backbone, head=head), seed=0)


def letters(l: int) -> dict[str, Tensor]:
    """A batch of one sequence, always the same."""
    rng = torch.Generator().manual_seed(0)
    return {"ids": torch.randint(LETTERS, (1, l), generator=rng), "targets": torch.zeros(1, dtype=torch.long)}


def time_steps(
    model: Model,
    batch: dict[str, Tensor],
    device: torch.device,
    *,
    reduce: Callable[[], None] = lambda: None,
    wait: Callable[[], None] = lambda: None,
    most: float = math.inf,
) -> tuple[float, float, float]:
    """Median milliseconds of a step of a batch on the device, its peak memory in GB, the last loss.

    `reduce` follows backward, `wait` joins several processes. From the second step on, one of over `most` seconds is
    the last.
    """
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        wait()
        return time.perf_counter()

    seconds = []
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = now()
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = model.loss(batch)
        loss.backward()
        reduce()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(now() - start)
        if len(seconds) > 1 and seconds[-1] > most:
            break
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return 1e3 * statistics.median(seconds[WARM_UP:] or seconds[-1:]), peak, loss.item()


def measure(backbone: BackboneConfig, l: int, device: torch.device, recompute: int, most: float) -> dict[str, Any]:
    """Milliseconds and memory of a step."""
    model = classifier(backbone).to(device)
    if recompute:
        recompute_layers(model, recompute)
    batch = {name: t.to(device) for name, t in letters(l).items()}
    ms, peak, _ = time_steps(model, batch, device, most=most)
    return {"ms": round(ms, 3), "tokens_per_s": round(1e3 * l / ms), "peak_gb": round(peak, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--most", type=float, default=5.0, help="seconds of a step after which lengths end")
    parser.add_argument("--recompute", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    about = record.origin(options.commit)
    rows: list[dict[str, Any]] = []
    print(f"{'mixer':12} {'l':>8} {'ms':>10} {'tokens/s':>12} {'peak GB':>8}")
    for mixer in options.mixers:
        for l in options.lengths:
            shape = {"mixer": mixer, "b": 1, "d": D_MODEL, "layers": options.layers, "recompute": options.recompute}
            row = {"op": "training_step", "impl": "ours", "shape": shape, "l": l, "dtype": "bf16", "pass": "step"}
            try:
                found = measure(MIXERS[mixer](options.layers), l, device, options.recompute, options.most)
            except torch.OutOfMemoryError:
                print(f"{mixer:12} {l:8} does not fit", flush=True)
                break
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            rows.append(row | found | about)
            print(
                f"{mixer:12} {l:8} {found['ms']:10.2f} {found['tokens_per_s']:12,} {found['peak_gb']:8.2f}", flush=True
            )
            if device.type == "cuda":
                record.write_rows("scaling", rows)
            if found["ms"] > 1e3 * options.most:
                break


if __name__ == "__main__":
    main()
