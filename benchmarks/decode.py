"""Times one decoding step of 130M-parameter language models on a GPU: from token ids to logits, by graph replay.

    python benchmarks/decode.py        # writes benchmarks/results/h200/decode.json

24 layers of width 768 with the vocabulary of state-spaces/mamba2-130m and mamba-130m (50,288 with its padding), tied
embedding, random weights: bfloat16, but A_log, D, dt_bias and the states float32. A row "step" is `Decoder(ids)`: ids
copied in, embedding, layers, final norm, logits of the whole vocabulary. "step+argmax" also takes the most likely token
as the next step's ids. ms: median over 20 CUDA-event timings of 20 steps each, per step. gb and floor_ms: every weight
read once, every state read and written once, at the measured speed of a copy. Beside it mamba_ssm's own graph (cg=True:
bfloat16 states, logits), where that is installed.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from typing import Any

import record
import torch
from costs import BYTES_PER_S
from timing import public
from torch import Tensor

import seqmodels
from seqmodels.config import HeadConfig, ModelConfig
from seqmodels.decoding import Decoder
from seqmodels.mixers import Mamba, Mamba2
from seqmodels.presets import mamba, mamba2

VOCABULARY, WIDTH, LAYERS, PROMPT, STEPS = 50288, 768, 24, 64, 20
BACKBONES = {"mamba2": mamba2(WIDTH, LAYERS), "mamba": mamba(WIDTH, LAYERS)}


def ours(mixer: str, b: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """The steps to time, and the bytes that one moves at least."""
    config = ModelConfig(vocab_size=VOCABULARY, backbone=BACKBONES[mixer], head=HeadConfig(task="next_token"))
    model = seqmodels.build(config, seed=0).to("cuda", torch.bfloat16).eval()
    for module in model.modules():
        if isinstance(module, (Mamba, Mamba2)):
            module.A_log.data, module.D.data = module.A_log.data.float(), module.D.data.float()
        if isinstance(module, Mamba2):
            module.dt_bias.data = module.dt_bias.data.float()
    ids = torch.randint(0, VOCABULARY, (b, PROMPT), device="cuda")
    with torch.inference_mode():
        _, state = model(ids)
    decoder = Decoder(model, state)
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    states = sum(tensor.nbytes for layer in state.layers for tensor in layer)
    ids = ids[:, :1].contiguous()

    def greedy() -> None:
        ids.copy_(decoder(ids).argmax(-1, keepdim=True))

    return {"step": lambda: decoder(ids), "step+argmax": greedy}, sum(weights.values()) + 2 * states


def mamba_ssm(mixer: str, b: int) -> dict[str, Callable[[], Tensor]] | None:
    """A step of its graph cache, as its generate(cg=True) takes it."""
    model_class, config_class = (
        public("mamba_ssm.models.mixer_seq_simple", "MambaLMHeadModel"),
        public("mamba_ssm.models.config_mamba", "MambaConfig"),
    )
    update_graph_cache = public("mamba_ssm.utils.generation", "update_graph_cache")
    if model_class is None or config_class is None or update_graph_cache is None:
        return None
    layer = {"layer": "Mamba2"} if mixer == "mamba2" else {}
    config = config_class(d_model=WIDTH, n_layer=LAYERS, vocab_size=50277, ssm_cfg=layer, pad_vocab_size_multiple=16)
    model = model_class(config, device="cuda", dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        cache = update_graph_cache(model, None, b, PROMPT, PROMPT + 1000)
    ids = torch.randint(0, 50277, (b, 1), device="cuda")
    positions = torch.full((b, 1), PROMPT, device="cuda")
    return {"step": lambda: cache.run(ids, positions, PROMPT)}


@torch.inference_mode()
def milliseconds(step: Callable[[], Any]) -> float:
    for _ in range(STEPS):
        step()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(STEPS):
            step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / STEPS)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 64, 256))
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = record.origin(options.commit)
    rows = []
    print(
        f"{'mixer':8} {'b':>4} {'pass':12} {'impl':10} {'ms':>8} {'floor':>8} {'tokens/s':>10} {'ours is faster':>15}"
    )
    for mixer in BACKBONES:
        for b in options.batches:
            steps, least = ours(mixer, b)
            found = [("ours", name, milliseconds(step)) for name, step in steps.items()]
            found += [("mamba_ssm", name, milliseconds(step)) for name, step in (mamba_ssm(mixer, b) or {}).items()]
            shape = {"mixer": mixer, "b": b, "d": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY}
            for implementation, name, ms in found:
                row = {
                    "op": "decode_step", "impl": implementation, "shape": shape, "l": 1, "dtype": "bf16", "pass": name,
                    "ms": round(ms, 4), "gb": round(least / 1e9, 4), "floor_ms": round(least / BYTES_PER_S * 1e3, 4),
                    "tokens_per_s": round(b / ms * 1e3),
                }  # fmt: skip
                if implementation == "ours":
                    row["ratio"] = {i: round(other / ms, 3) for i, n, other in found if n == name and i != "ours"}
                rows.append(row | about)
                ratios = " ".join(f"{ratio:.2f}" for ratio in row.get("ratio", {}).values())
                figures = f"{ms:8.4f} {row['floor_ms']:8.4f} {row['tokens_per_s']:10,} {ratios:>15}"
                print(f"{mixer:8} {b:4} {name:12} {implementation:10} {figures}", flush=True)
            record.write_rows("decode", rows)
            del steps
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
