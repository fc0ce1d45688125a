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
from typing import Any

import record
import torch
import torch.distributed as dist
from scaling import D_MODEL, classifier, letters, time_steps
from torch.distributed.device_mesh import DeviceMesh

from seqmodels.presets import mamba2
from seqmodels.sequence_parallel import parallelise, reduce_gradients, split

LENGTHS = (262144, 1048576, 2097152, 4194304)


def measure(mesh: DeviceMesh, device: torch.device, layers: int, l: int) -> dict[str, Any]:
    """Milliseconds and memory of a step of all ranks of the mesh."""
    model = parallelise(classifier(mamba2(D_MODEL, layers, d_state=64)).to(device), mesh)
    part = {name: t.to(device) for name, t in split(letters(l), mesh).items()}
    group = mesh["sequence"].get_group()
    ms, peak, loss = time_steps(
        model, part, device, reduce=lambda: reduce_gradients(model, mesh), wait=lambda: dist.barrier(group)
    )
    most = torch.tensor(peak, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return {
        "ms": round(ms, 3), "tokens_per_s": round(1e3 * l / ms), "peak_gb": round(most.item(), 3),
        "loss": round(loss, 6),
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
    about = record.origin(options.commit, "torchrun", "--nproc-per-node", str(world))
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
                    record.write_rows("sequence_parallel", rows)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
