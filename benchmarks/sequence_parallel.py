"""Times training steps of a Mamba-2 classifier whose one sequence lies on 1, 2, 4, ... GPUs.

    torchrun --nproc-per-node 2 benchmarks/sequence_parallel.py      # writes results/GPU/sequence_parallel.json
    torchrun --nproc-per-node 2 benchmarks/sequence_parallel.py --device cpu --layers 2 --lengths 4096   # only prints

8 layers, d = 256, h = 8, p = 64, n = 64, batch 1, weights in float32, autocast to bfloat16. A step is loss, backward,
sum of the gradients over the ranks and AdamW. `ms` is the median step between barriers, `peak_gb` all memory of the
rank that needs most, `speedup` against one rank at the same length, where it fits.
"""

import argparse
import datetime
import gc
import os
import shlex
import statistics
import sys
import time
from typing import Any

import record
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import seqmodels
from seqmodels.config import BackboneConfig, HeadConfig, Mamba2Config, ModelConfig
from seqmodels.sequence_parallel import parallelise, reduce_gradients, split

LENGTHS = (262144, 1048576, 2097152, 4194304)
WARM_UP, STEPS = 2, 5
D_MODEL, CLASSES, LETTERS = 256, 5, 4


def measure(mesh: DeviceMesh, device: torch.device, layers: int, l: int) -> dict[str, Any]:
    """Milliseconds and memory of a step of all ranks of the mesh."""
    mixer = Mamba2Config(d_state=64, head_dim=64)
    backbone = BackboneConfig(d_model=D_MODEL, layers=(mixer,) * layers)
    head = HeadConfig(task="sequence", labels=tuple("abcde"))
    config = ModelConfig(vocab_size=LETTERS, backbone=backbone, head=head)
    model = parallelise(seqmodels.build(config, seed=0).to(device), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    rng = torch.Generator().manual_seed(0)  # the same sequence on every rank
    batch = {"ids": torch.randint(LETTERS, (1, l), generator=rng), "targets": torch.zeros(1, dtype=torch.long)}
    part = {name: t.to(device) for name, t in split(batch, mesh).items()}
    group = mesh["sequence"].get_group()

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group)
        return time.perf_counter()

    seconds = []
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = wait()
        with torch.autocast(device.type, torch.bfloat16):
            loss, _ = model.loss(part)
        loss.backward()
        reduce_gradients(model, mesh)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(wait() - start)
    milliseconds = 1e3 * statistics.median(seconds[WARM_UP:])
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    return {
        "ms": round(milliseconds, 3), "tokens_per_s": round(1e3 * l / milliseconds), "peak_gb": round(peak.item(), 3),
        "loss": round(loss.item(), 6),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks; powers of two up to all by default")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    rank, world = dist.get_rank(), dist.get_world_size()
    words = sys.argv[1:]
    if "--commit" in words:  # names what was measured, is no part of how
        del words[(at := words.index("--commit")) : at + 2]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    about = {
        "gpu": name, "versions": record.versions(), "commit": options.commit or record.commit(),
        "command": shlex.join(["torchrun", "--nproc-per-node", str(world), os.path.relpath(sys.argv[0]), *words]),
    }  # fmt: skip
    shape = {"layers": options.layers, "d": D_MODEL, "h": 8, "p": 64, "n": 64, "b": 1}
    rows: list[dict[str, Any]] = []
    times: dict[tuple[int, int], float] = {}
    for ranks in options.ranks or [2**i for i in range(world.bit_length())]:
        mesh = DeviceMesh(device.type, torch.arange(ranks), mesh_dim_names=("sequence",))
        for l in options.lengths if rank < ranks else ():
            try:
                row = {"op": "training_step", "shape": shape, "l": l, "dtype": "bf16", "ranks": ranks}
                row |= measure(mesh, device, options.layers, l)
            except torch.cuda.OutOfMemoryError as error:
                if ranks > 1:  # the others are waiting
                    raise
                print(f"{ranks} ranks, l = {l}: {str(error).splitlines()[0]}", flush=True)
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            if (1, l) in times:
                row["speedup"] = round(times[1, l] / row["ms"], 3)
            times[ranks, l] = row["ms"]
            rows.append(row | about)
            if rank == 0:
                print(*(f"{key} {value}" for key, value in row.items() if key not in ("op", "shape")), flush=True)
                if device.type == "cuda":
                    place = name.removeprefix("NVIDIA ").lower().replace(" ", "-")
                    record.write_rows(f"{place}/sequence_parallel", rows)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
