"""Time and memory of a bidirectional classifier on one long sequence: one pass, two sweeps, and windows.

    python benchmarks/sweeps.py                                                     # on a CPU
    python benchmarks/sweeps.py --length 262144 --limit 2                           # in at most 3 GiB
    python benchmarks/sweeps.py --length 4194304 --width 256 --device cuda --dtype bfloat16

A random Mamba-2 model reads random bases, each way in a process of its own; windows are of two chunks. `limit_gib`
bounds that process's private memory (RLIMIT_DATA). `peak_host_mib` is its largest resident memory above that before the
reading; `peak_device_mib` the largest memory on the GPU above the weights. `error` compares logits with those of two
sweeps.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import record
import torch

import seqmodels
from seqmodels import presets
from seqmodels.config import HeadConfig, ModelConfig
from seqmodels.sweeps import host_bytes, two_sweeps, windows

WAYS = ("two-sweeps", "windows", "whole")


@torch.inference_mode()
def read(way: str, options: argparse.Namespace) -> dict:
    """One reading, in this process."""
    torch.set_num_threads(options.threads)
    if options.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (int(options.limit * 2**30), resource.RLIM_INFINITY))
    backbone = presets.mamba2(options.width, options.layers, d_state=64, bidirectional=True)
    head = HeadConfig(task="sequence", labels=("a", "b"))
    model = seqmodels.build(ModelConfig(vocab_size=16, backbone=backbone, head=head), seed=0).eval()
    model.to(options.device, getattr(torch, options.dtype))
    gpu = options.device != "cpu"
    ids = torch.randint(7, 11, (1, options.length), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    chunk = options.chunk or (1 << 18 if gpu else 1 << 14)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        if way == "whole":
            return model(ids.to(options.device).long())
        if way == "two-sweeps":
            return model.classify(model.pool(two_sweeps(model.backbone, ids, chunk=chunk)))
        return model.classify(model.pool(windows(model.backbone, [ids], window=2 * chunk, context=chunk // 4)))

    logits(ids[:, : 4 * chunk if gpu else 1000])  # imports, and compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    started = time.monotonic()
    found = logits(ids).double().flatten().tolist()
    row = {
        "length": options.length, "reading": way, "width": options.width, "layers": options.layers, "chunk": chunk,
        "device": options.device, "threads": options.threads, "dtype": options.dtype, "limit_gib": options.limit,
        "logits": found,
        "seconds": round(time.monotonic() - started, 3),
        "peak_host_mib": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
    }  # fmt: skip
    if gpu:
        row["peak_device_mib"] = round((torch.cuda.max_memory_allocated() - weights) / 2**20)
    if way == "two-sweeps":
        row["host_bytes_mib"] = round(host_bytes(model.backbone, options.length, chunk) / 2**20)
    return row


def main() -> None:
    """Every way, recorded; one that fails for want of memory has no figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--limit", type=float, help="GiB")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(read(options.way, options)))
        return
    rows, about, exact = [], record.origin(options.commit), []
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--way", way]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            row = {"length": options.length, "reading": way, "limit_gib": options.limit}
            row["failed"] = done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else "killed"
        else:
            row = json.loads(done.stdout.splitlines()[-1])
            found = row.pop("logits")
            exact = found if way == "two-sweeps" else exact
            row["error"] = max(abs(a - b) for a, b in zip(found, exact, strict=True))
        print(row, flush=True)
        rows.append(row if options.device == "cpu" else row | about)
    name = f"sweeps-{options.length}" + (f"-limit-{options.limit:g}" if options.limit else "")
    print(record.write_result(name, rows) if options.device == "cpu" else record.write_rows(name, rows))


if __name__ == "__main__":
    main()
