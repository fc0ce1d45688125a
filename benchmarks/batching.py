"""How much of a training batch is padding, and real tokens per second, for records batched in three ways.

    python benchmarks/batching.py S288C.cds.bed.gz ecoli_K12_MG1655.cds.bed.gz     # records as long as these intervals
    python benchmarks/batching.py S288C.cds.bed.gz --device cuda --batch-tokens 262144

shuffled: as many records, in random order, as the longest of all allows; padded: `dna train --batching padded`;
packed: `dna train --batching packed`. Bases are random. A step is loss, backward and AdamW of the default model of `dna
train`, on batches spread over a pass, weights in float32, on a GPU autocast to bfloat16.
"""

import argparse
import gzip
import time
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch

import seqmodels
from seqmodels.config import BackboneConfig, HeadConfig, ModelConfig
from seqmodels.presets import mamba, mamba2
from seqmodels.tasks.genomics.datasets import Augmentation, Batch, RecordData, to_batch
from seqmodels.tasks.genomics.labelled import LabelledRecords
from seqmodels.tasks.genomics.tokens import VOCAB_SIZE, A, T

MIXERS = {
    "mamba2": lambda: mamba2(128, 4),
    "mamba": lambda: mamba(128, 4),
    "bi-mamba2": lambda: mamba2(128, 4, bidirectional=True),
}


class Shuffled(RecordData):
    """Records in random order, as many per batch as of the longest would fit."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.size = max(1, self.batch_tokens // int(self._read.max()))
        self.order = np.random.default_rng(0).permutation(self.training)
        self.batches_per_pass = -(-len(self.order) // self.size)

    def train_batch(self, step: int) -> Batch:
        places = self.order[step * self.size : (step + 1) * self.size]
        return to_batch([self.records.tokens[i] for i in places], self.records.labels[places])


def records_of(intervals: list[Path]) -> LabelledRecords:
    """Random records as long as the intervals of BED files, of two classes."""
    lines = [line.split() for path in intervals for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    rng = np.random.default_rng(0)
    tokens = [rng.integers(A, T + 1, int(end) - int(start), dtype=np.uint8) for _, start, end, *_ in lines]
    labels = rng.integers(2, size=len(tokens))
    return LabelledRecords([str(i) for i in range(len(tokens))], tokens, labels, ("a", "b"), long=False)


def measure(data: RecordData, backbone: BackboneConfig, device: torch.device, count: int) -> dict[str, Any]:
    """Padding over a pass, and the speed of steps on `count` of its batches."""
    batches = [data.train_batch(i) for i in range(data.batches_per_pass)]
    real, held = sum(int(b["lengths"].sum()) for b in batches), sum(b["ids"].numel() for b in batches)
    head = HeadConfig(task="sequence", labels=("a", "b"))
    model = seqmodels.build(ModelConfig(vocab_size=VOCAB_SIZE, backbone=backbone, head=head), seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")

    def steps(chosen: list[Batch]) -> float:
        started = time.perf_counter()
        for batch in chosen:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, _ = model.loss({name: tensor.to(device) for name, tensor in batch.items()})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    shares = {
        "padding": round(1 - real / held, 4), "batches": len(batches), "tokens_per_batch": round(real / len(batches)),
    }  # fmt: skip
    if not count:
        return shares
    chosen = [batches[i] for i in np.linspace(0, len(batches) - 1, count).astype(int)]
    steps(chosen if device.type == "cuda" else chosen[:1])  # compiles
    seconds = steps(chosen)
    return shares | {"tokens_per_s": round(sum(int(b["lengths"].sum()) for b in chosen) / seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("intervals", type=Path, nargs="+", help="BED files, .gz")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--batches", type=int, default=6, help="that are timed; 0 for the padding alone")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    records, rows = records_of(options.intervals), []
    unchanged = Augmentation(reverse_complement=False)
    common = {"batch_tokens": options.batch_tokens, "validation_fraction": 0.1, "augment": unchanged, "seed": 0}
    for mixer in options.mixers:
        for batching in ("shuffled", "padded", "packed"):
            kind = Shuffled if batching == "shuffled" else RecordData
            data = kind(records, [], **common, packed=batching == "packed")
            found = measure(data, MIXERS[mixer](), torch.device(options.device), options.batches)
            rows.append({"mixer": mixer, "batching": batching, "batch_tokens": options.batch_tokens} | found)
            print(rows[-1], flush=True)
    print(record.write_result(f"batching-{options.device}", rows))


if __name__ == "__main__":
    main()
