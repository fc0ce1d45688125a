"""Training steps of the U-Net of sound on real recordings, and which kernels they take.

    python benchmarks/audio_training.py $LONGSEQ_DATA/audio/fsdd          # writes results/GPU/audio_training.json
    python benchmarks/audio_training.py DATA --device cpu --tokens 4096 --widths 32 32 --depths 1 1 --pools 4

A step is what `audio train` makes: loss, backward, clipping, AdamW, moving average, in bfloat16 with float32 weights,
of batches that are on the device already. `graphs` replays the gradients' kernels as one launch (seqmodels/graphs.py),
`eager` launches each. Samples per second are without padding; `ms` is the mean over --steps steps after those that
compile and record; `kernels` is what one step launches. --profile also prints the 25 that take longest in one step.
A CPU only prints.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import seqmodels
from seqmodels.graphs import WARM_UP, GradientGraphs
from seqmodels.heads import IGNORED
from seqmodels.presets import multiscale
from seqmodels.tasks.audio.train import DataConfig, load_data, model_config
from seqmodels.training import parameter_groups, sent

SHOWN = 25
BATCHES = 4  # of the data, in turn


class Training:
    """Optimizer steps on a few batches in turn, as `audio train` makes them."""

    def __init__(self, model: Any, batches: list[dict[str, Tensor]], graphs: bool) -> None:
        self.model, self.batches, self.done = model.train(), batches, 0
        self.graphs = GradientGraphs(model) if graphs else None
        groups, fused = parameter_groups(model, 0.1), next(model.parameters()).is_cuda
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=fused)
        self.arriving: Callable[[], list[float]] | None = None  # loss and norm of the step before
        self.averaged = [parameter.detach().clone() for parameter in model.parameters()]

    def step(self) -> None:
        """One step on the next batch."""
        batch = self.batches[self.done % len(self.batches)]
        self.optimizer.zero_grad()
        with torch.autocast(batch["ids"].device.type, torch.bfloat16):
            found = None if self.graphs is None else self.graphs(batch)
            loss = self.model.loss(batch)[0] if found is None else found["loss"]
        if found is None:
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        before, self.arriving = self.arriving, sent(torch.stack([loss.detach(), norm]))
        self.optimizer.step()
        if before is not None and not math.isfinite(sum(before())):  # waits for the step before, as training does
            raise SystemExit(f"step {self.done}: the loss and the norm of its gradient are {before()}")
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, list(self.model.parameters()), 1e-3)
        self.done += 1


def measure(training: Training, steps: int, show: bool) -> dict[str, Any]:
    """Milliseconds of a step, real samples per second, memory and kernels."""
    batches, cuda = training.batches, training.batches[0]["ids"].is_cuda
    for _ in range((WARM_UP + 2) * len(batches)):  # each shape compiles, then is recorded
        training.step()
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    samples = [int((batch["targets"] != IGNORED).sum()) for batch in batches]
    real = sum(samples[(training.done + i) % len(batches)] for i in range(steps))
    start = time.perf_counter()
    for _ in range(steps):
        training.step()
    wait()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as trace:
        training.step()
        wait()
    taken: dict[str, list[float]] = {}
    for event in trace.events():
        if not cuda:
            taken.setdefault(event.name, []).append(event.self_cpu_time_total / 1e3)
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:  # a range, not a kernel
            taken.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    if show:
        for name, times in sorted(taken.items(), key=lambda item: -sum(item[1]))[:SHOWN]:
            print(f"  {sum(times):9.3f} ms {len(times):5} x  {name[:100]}")
    return {
        "ms": round(1e3 * seconds / steps, 3), "samples_per_s": round(real / seconds), "peak_gb": round(peak, 3),
        "kernels": sum(map(len, taken.values())), "kernel_ms": round(sum(map(sum, taken.values())), 3),
        "graphs": 0 if training.graphs is None else len(training.graphs._recorded),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="recordings with a column word, as FSDD")
    parser.add_argument("--tokens", type=int, nargs="+", default=(65536, 131072, 262144), help="of a batch")
    parser.add_argument("--impls", nargs="+", choices=("eager", "graphs"), default=("eager", "graphs"))
    parser.add_argument("--widths", type=int, nargs="+", default=(128, 192, 256))
    parser.add_argument("--depths", type=int, nargs="+", default=(4, 4, 6))
    parser.add_argument("--pools", type=int, nargs="+", default=(4, 4))
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    about = record.origin(options.commit)
    backbone = multiscale(
        tuple(options.widths), tuple(options.depths), tuple(options.pools), dropout=options.dropout
    )  # fmt: skip
    sizes = " ".join(f"{name} {getattr(options, name)}" for name in ("widths", "depths", "pools", "dropout"))
    rows: list[dict[str, Any]] = []
    print(f"{'impl':8} {'tokens':>8} {'ms':>9} {'samples/s':>12} {'peak GB':>8} {'kernels':>8} {'their ms':>9}")
    for tokens in options.tokens:
        clips = DataConfig(conditions="digit=word", batch_tokens=tokens)
        data, conditions, mu_law = load_data(options.data, clips)
        batches = [{name: t.to(device) for name, t in data.train_batch(i).items()} for i in range(BATCHES)]
        for impl in options.impls if device.type == "cuda" else ("eager",):
            model = seqmodels.build(model_config(backbone, conditions, mu_law), seed=0).to(device)
            found = measure(Training(model, batches, impl == "graphs"), options.steps, options.profile)
            del model
            gc.collect()
            row = {"op": "audio_training", "impl": impl, "shape": sizes, "l": tokens, "dtype": "bf16", "pass": "step"}
            rows.append(row | found | about)
            print(
                f"{impl:8} {tokens:8} {found['ms']:9.2f} {found['samples_per_s']:12,} {found['peak_gb']:8.2f} "
                f"{found['kernels']:8} {found['kernel_ms']:9.2f}", flush=True,
            )  # fmt: skip
            if device.type == "cuda":
                torch.cuda.empty_cache()
                record.write_rows("audio_training", rows)


if __name__ == "__main__":
    main()
