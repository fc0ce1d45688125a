"""Times the generation of sound with the shipped spoken-digits model.

    python benchmarks/generate.py                       # on a GPU writes benchmarks/results/<gpu>/generate.json
    python benchmarks/generate.py --device cpu --batches 1 8 --seconds 1

Samples per second are those of decoding from the drawn sample to the next one: the model's step, guidance, filters and
the draw, the results brought to main memory every 256 steps, as `longseq audio generate` does; the prompt (a label) and
the recording of CUDA graphs come before. The end is barred, so that every row goes on: of each batch `seconds` of
sound after a quarter of that for warming up, best of `--repeats`.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import record
import torch

import seqmodels
from seqmodels.checkpoint import choose_device
from seqmodels.sampling import CHECK, Sampler, Sampling, prefill
from seqmodels.tasks.audio.generate import label_ids
from seqmodels.tasks.audio.waveform import mu_law_of


def sampler_of(model: Any, told: Sequence[dict[str, str]], sampling: Sampling, seed: int = 0) -> Sampler:
    """Of a row for each of the labels that the model is told, without an end."""
    mu_law, b = mu_law_of(model.config.tokenizer), len(told)
    untold = [{}] * (b if sampling.guidance != 1 else 0)
    given = torch.cat([label_ids(model.config.conditions, labels) for labels in (*told, *untold)]).to(model.device)
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
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    device = choose_device(options.device)
    about = record.origin(options.commit) | {"threads": torch.get_num_threads()}
    if device.type == "cpu":
        about |= record.machine() | {"gpu": "cpu"}
    sampling = Sampling(top_p=options.top_p, guidance=options.guidance)
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes if device.type == "cuda" else ("float32",):
        model = seqmodels.load(options.model, device=device, dtype=getattr(torch, dtype))
        known = {condition.name for condition in model.config.conditions}
        word = {"digit": "seven"} if "digit" in known else {}
        steps = round(options.seconds * mu_law_of(model.config.tokenizer).sample_rate)
        for b in options.batches:
            sampler, times = sampler_of(model, [word] * b, sampling), []
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


if __name__ == "__main__":
    main()
