"""Times the generation of sound with the shipped spoken-digits model, and lets a model run for a minute of 16 kHz.

    python benchmarks/generate.py                       # on a GPU writes benchmarks/results/<gpu>/generate.json
    python benchmarks/generate.py --device cpu --batches 1 8 --seconds 1
    python benchmarks/generate.py --minute --model runs/context/122880/model      # of music_context.py

--minute is 960,000 samples in one run: speed, memory, energy, entropy. It is for models of long recordings: one of
words falls silent after its word.

Samples per second are those of decoding from the drawn sample to the next one: the model's step, guidance, filters and
the draw, the results brought to main memory every 256 steps, as `longseq audio generate` does; the prompt (a label) and
the recording of CUDA graphs come before. The end is barred, so that every row goes on: of each batch `seconds` of
sound after a quarter of that for warming up, best of `--repeats`. The minute's rows are seconds at the model's rate:
level in dBFS, the mean of -log2 p of the samples drawn, whose expectation is the entropy of what the model predicts,
and the memory in use.
"""

import argparse
import json
import math
import resource
import time
from typing import Any

import numpy as np
import record
import torch

import seqmodels
from seqmodels.checkpoint import choose_device
from seqmodels.sampling import CHECK, Sampler, Sampling, prefill
from seqmodels.tasks.audio.generate import label_ids
from seqmodels.tasks.audio.waveform import mu_law_of

MINUTE = 960_000


def sampler_of(model: Any, b: int, sampling: Sampling, seed: int = 0) -> Sampler:
    """Of b rows that say seven, if the model knows digits, without an end."""
    mu_law, known = mu_law_of(model.config.tokenizer), {condition.name for condition in model.config.conditions}
    given = label_ids(model.config.conditions, {"digit": "seven"} if "digit" in known else {}).to(model.device)
    if sampling.guidance != 1:
        given = torch.cat([given, label_ids(model.config.conditions, {}).to(model.device)])
    given = given.repeat_interleave(b, 0)
    after = prefill(model, [torch.full((len(given), 1), mu_law.bos)], given)
    return Sampler(
        model, after, seeds=[(seed, i) for i in range(b)], sampling=sampling, barred=[*mu_law.unsound, mu_law.eos],
        conditions=given,
    )  # fmt: skip


def draw(sampler: Sampler, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities (b, steps) in main memory."""
    parts = [sampler(min(CHECK, steps - done)) for done in range(0, steps, CHECK)]
    tokens, nats = (torch.cat(part, 1).cpu().numpy() for part in zip(*parts, strict=True))
    return tokens, nats


def memory_mib(device: torch.device) -> float:
    """Most memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="spoken-digits")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16", "float32"))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16, 256))
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=2.0, help="of sound per row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minute", action="store_true", help="960,000 samples in one run, float32, batch 1")
    parser.add_argument("--samples", type=int, default=MINUTE, help="of --minute")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    device = choose_device(options.device)
    about = record.origin(options.commit) | {"threads": torch.get_num_threads()}
    if device.type == "cpu":
        about |= record.machine() | {"gpu": "cpu"}
    sampling = Sampling(top_p=options.top_p, guidance=options.guidance)
    rows: list[dict[str, Any]] = []
    if options.minute:
        model = seqmodels.load(options.model, device=device)
        rows.append(run_long(model, options, sampling) | about)
        record.write_rows("generate", rows)
        return
    for dtype in options.dtypes if device.type == "cuda" else ("float32",):
        model = seqmodels.load(options.model, device=device, dtype=getattr(torch, dtype))
        steps = round(options.seconds * mu_law_of(model.config.tokenizer).sample_rate)
        for b in options.batches:
            sampler, times = sampler_of(model, b, sampling), []
            draw(sampler, max(64, steps // 4))
            for _ in range(options.repeats):
                begun = time.perf_counter()
                draw(sampler, steps)
                times.append(time.perf_counter() - begun)
            best = min(times)
            shape = {"model": options.model, "b": b, "guidance": options.guidance, "top_p": options.top_p}
            rows.append({
                "op": "generate", "impl": "ours", "shape": shape, "l": steps, "dtype": dtype, "pass": "decode",
                "samples_per_s": round(b * steps / best), "us_per_step": round(best / steps * 1e6, 1),
                "runs_s": [round(t, 4) for t in times],
            } | about)  # fmt: skip
            print(f"{dtype:9} b={b:4} {rows[-1]['us_per_step']:9.1f} us/step {rows[-1]['samples_per_s']:12,} samples/s")
            record.write_rows("generate", rows)
            del sampler


def run_long(model: Any, options: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    """One row's samples, second by second."""
    mu_law = mu_law_of(model.config.tokenizer)
    sampler, seconds = sampler_of(model, 1, sampling), []
    begun = time.perf_counter()
    for _ in range(0, options.samples, mu_law.sample_rate):
        tokens, nats = draw(sampler, mu_law.sample_rate)
        level = float(np.sqrt(np.mean(np.square(mu_law.decode(tokens[0]), dtype=np.float64))))
        seconds.append({
            "dbfs": round(20 * math.log10(max(level, 1e-6)), 2),
            "bits": round(float(-nats.mean(dtype=np.float64)) / math.log(2), 4),
            "mib": round(memory_mib(model.device), 1),
        })  # fmt: skip
        print(f"{len(seconds):4} s  {json.dumps(seconds[-1])}", flush=True)
    took = time.perf_counter() - begun
    made = len(seconds) * mu_law.sample_rate
    return {
        "op": "generate", "impl": "ours", "l": made, "dtype": "float32", "pass": "long run",
        "shape": {"model": options.model, "b": 1, "guidance": sampling.guidance}, "samples_per_s": round(made / took),
        "columns": list(seconds[0]), "each_second": [list(second.values()) for second in seconds],
    }  # fmt: skip


if __name__ == "__main__":
    main()
