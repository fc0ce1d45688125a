"""Times one decoding step of language models on a GPU: from token ids to logits, by graph replay.

    python benchmarks/decode.py                                # writes benchmarks/results/GPU/decode.json
    python benchmarks/decode.py --mixers mamba mamba2 attention --batches 1 2 4 8 16 32 64 128
    python benchmarks/decode.py --device cpu --width 64 --layers 2 --batches 1 --mixers mamba2 attention  # only prints

130M parameters unless --width and --layers say otherwise: 24 layers of width 768 with the vocabulary of
state-spaces/mamba2-130m and mamba-130m (50,288 with its padding), tied embedding, random weights: bfloat16, but A_log,
D, dt_bias and the states float32. A row "step" is `Decoder(ids)`: ids copied in, embedding, layers, final norm, logits
of the whole vocabulary. "step+argmax" also takes the most likely token as the next step's ids. ms: median over
CUDA-event timings of 20 steps each, per step. gb and floor_ms: every weight read once, every state read and written
once, at the measured speed of a copy. Beside it mamba_ssm's own graph (cg=True: bfloat16 states, logits), where that is
installed.

attention is a Transformer of the same width and as many parameters (15 layers with gated MLPs for 24) after --context
tokens: its step is a CUDA graph too, its keys and values (bfloat16) stay where they are, and it attends through SDPA
(FlashAttention), without a mask. Its floor reads all keys and values once.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
import torch.nn.functional as F
from costs import BYTES_PER_S
from timing import public
from torch import Tensor, nn

import seqmodels
from seqmodels.baselines import Attention
from seqmodels.config import BackboneConfig, HeadConfig, ModelConfig
from seqmodels.decoding import Decoder
from seqmodels.heads import Model
from seqmodels.mixers import Mamba, Mamba2
from seqmodels.presets import attention, mamba, mamba2

VOCABULARY, WIDTH, LAYERS, PROMPT, STEPS = 50288, 768, 24, 64, 20
HEAD = 64  # channels of an attention head
MIXERS = ("mamba2", "mamba", "attention")
Step = Callable[[Tensor], Tensor]


class CachedAttention(nn.Module):
    """A step of an `Attention` whose keys and values stay where they are: the last of their places is the step's own.

    Every call is the step at that last place, so that all cost the same and can be replayed as a CUDA graph.
    """

    def __init__(self, mixer: Attention, keys: Tensor, values: Tensor) -> None:
        """keys (rotated) and values (b, heads, t, p) of t - 1 steps of the past, and room for one more."""
        super().__init__()
        self.mixer, self.keys, self.values = mixer, keys, values
        half = keys.shape[-1] // 2
        angle = (keys.shape[2] - 1) * mixer.config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        self.cos, self.sin = (torch.cat(parts).to(keys) for parts in ((angle.cos(),) * 2, (-angle.sin(), angle.sin())))

    def forward(self, x: Tensor, *_: None) -> tuple[Tensor, None]:
        """x (b, 1, d) -> (b, 1, d)."""
        b, _, d = x.shape
        projected = self.mixer.in_proj(x).view(b, 3, self.mixer.config.num_heads, -1)
        turned = projected[:, :2]
        turned = torch.addcmul(turned * self.cos, turned.roll(turned.shape[-1] // 2, -1), self.sin)
        self.keys[:, :, -1], self.values[:, :, -1] = turned[:, 1], projected[:, 2]
        y = F.scaled_dot_product_attention(turned[:, 0, :, None], self.keys, self.values)
        return self.mixer.out_proj(y.view(b, 1, d)), None


def backbone(mixer: str, width: int, layers: int) -> BackboneConfig:
    """A Transformer's layer has 10 d^2 parameters, one of Mamba or Mamba-2 somewhat more than 6 d^2."""
    if mixer == "attention":
        return attention(width, round(layers * 5 / 8), num_heads=max(1, width // HEAD))
    return (mamba2 if mixer == "mamba2" else mamba)(width, layers)


def language_model(config: BackboneConfig, device: torch.device) -> Model:
    """With random weights, in bfloat16 but for what governs the states."""
    with device:
        model = seqmodels.build(
            ModelConfig(vocab_size=VOCABULARY, backbone=config, head=HeadConfig(task="next_token")), seed=0
        )
    model = model.to(torch.bfloat16).eval()
    for module in model.modules():
        if isinstance(module, (Mamba, Mamba2)):
            module.A_log.data, module.D.data = module.A_log.data.float(), module.D.data.float()
        if isinstance(module, Mamba2):
            module.dt_bias.data = module.dt_bias.data.float()
    return model


@torch.inference_mode()
def after_prompt(model: Model, b: int) -> tuple[Step, int]:
    """Steps after a prompt, by a decoder; and the bytes of states that one moves at least."""
    _, state = model(torch.randint(0, VOCABULARY, (b, PROMPT), device=model.device))
    states = sum(tensor.nbytes for layer in state.layers for tensor in layer)
    return Decoder(model, state), 2 * states


@torch.inference_mode()
def after_context(model: Model, b: int, context: int) -> tuple[Step, int]:
    """The step of a Transformer after so many (random) tokens, recorded on a GPU; and the bytes of keys and values."""
    cached = 0
    for layer in model.backbone.layers:
        mixer = layer.mixer.mixer if isinstance(layer.mixer, CachedAttention) else layer.mixer
        heads, p = mixer.config.num_heads, mixer.out_proj.in_features // mixer.config.num_heads
        keys, values = torch.randn(2, b, heads, context + 1, p, device=model.device, dtype=torch.bfloat16)
        layer.mixer = CachedAttention(mixer, keys, values)
        cached += keys.nbytes + values.nbytes
    if model.device.type == "cpu":
        return lambda ids: model(ids)[0][:, -1], cached
    graph, static_ids = torch.cuda.CUDAGraph(), torch.zeros(b, 1, dtype=torch.long, device=model.device)
    model(static_ids)  # compiles what a graph cannot
    with torch.cuda.graph(graph):
        logits = model(static_ids)[0][:, -1]

    def step(ids: Tensor) -> Tensor:
        static_ids.copy_(ids)
        graph.replay()
        return logits

    return step, cached


def steps_to_time(step: Step, b: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    ids = torch.randint(0, VOCABULARY, (b, 1), device=device)

    def greedy() -> None:
        ids.copy_(step(ids).argmax(-1, keepdim=True))

    return {"step": lambda: step(ids), "step+argmax": greedy}


def mamba_ssm(mixer: str, b: int, width: int, layers: int) -> dict[str, Callable[[], Tensor]]:
    """A step of its graph cache, as its generate(cg=True) takes it; nothing where it is not installed."""
    model_class, config_class = (
        public("mamba_ssm.models.mixer_seq_simple", "MambaLMHeadModel"),
        public("mamba_ssm.models.config_mamba", "MambaConfig"),
    )
    update_graph_cache = public("mamba_ssm.utils.generation", "update_graph_cache")
    if mixer == "attention" or model_class is None or config_class is None or update_graph_cache is None:
        return {}
    layer = {"layer": "Mamba2"} if mixer == "mamba2" else {}
    config = config_class(d_model=width, n_layer=layers, vocab_size=50277, ssm_cfg=layer, pad_vocab_size_multiple=16)
    model = model_class(config, device="cuda", dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        cache = update_graph_cache(model, None, b, PROMPT, PROMPT + 1000)
    ids = torch.randint(0, 50277, (b, 1), device="cuda")
    positions = torch.full((b, 1), PROMPT, device="cuda")
    return {"step": lambda: cache.run(ids, positions, PROMPT)}


@torch.inference_mode()
def milliseconds(step: Callable[[], Any], device: torch.device) -> float:
    """Per step: the median of 5 to 20 timings of STEPS steps, in about half a second."""

    def timed() -> float:
        if device.type == "cpu":
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            return 1e3 * (time.perf_counter() - began) / STEPS
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(STEPS):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / STEPS

    timed()
    count = min(20, max(5, round(500 / (timed() * STEPS))))
    return statistics.median(timed() for _ in range(count))


def measured(
    mixer: str, model: Model, b: int, options: argparse.Namespace, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one batch size, mamba_ssm's last."""
    config = model.config.backbone
    shape = {"mixer": mixer, "b": b, "d": config.d_model, "layers": len(config.layers), "vocabulary": VOCABULARY}
    if mixer == "attention":
        shape["context"] = options.context
        step, states = after_context(model, b, options.context)
    else:
        step, states = after_prompt(model, b)
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    least, parameters = sum(weights.values()) + states, sum(parameter.numel() for parameter in model.parameters())
    ours = "sdpa" if mixer == "attention" else "ours"
    ways = [
        (ours, steps_to_time(step, b, model.device)),
        ("mamba_ssm", mamba_ssm(mixer, b, config.d_model, len(config.layers))),
    ]
    found = [(impl, name, milliseconds(call, model.device)) for impl, steps in ways for name, call in steps.items()]
    rows = []
    for impl, name, ms in found:
        row = {
            "op": "decode_step", "impl": impl, "shape": shape, "l": 1, "dtype": "bf16", "pass": name,
            "ms": round(ms, 4), "gb": round(least / 1e9, 4), "floor_ms": round(least / BYTES_PER_S * 1e3, 4),
            "tokens_per_s": round(b / ms * 1e3), "parameters": parameters,
        }  # fmt: skip
        if impl == "ours":
            row["ratio"] = {i: round(other / ms, 3) for i, n, other in found if n == name and i != "ours"}
        rows.append(row | about)
        ratios = " ".join(f"{ratio:.2f}" for ratio in row.get("ratio", {}).values())
        print(
            f"{mixer:9} {b:4} {name:12} {impl:10} {ms:8.4f} {row['floor_ms']:8.4f} {row['tokens_per_s']:10,} "
            f"{ratios:>15}", flush=True,
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=("mamba2", "mamba"))
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 8, 64, 256))
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of Mamba and Mamba-2")
    parser.add_argument("--context", type=int, default=2048, help="tokens in a Transformer's cache")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    torch.manual_seed(0)
    device, about = torch.device(options.device), record.origin(options.commit)
    rows: list[dict[str, Any]] = []
    print(
        f"{'mixer':9} {'b':>4} {'pass':12} {'impl':10} {'ms':>8} {'floor':>8} {'tokens/s':>10} {'ours is faster':>15}"
    )
    for mixer in options.mixers:
        model = language_model(backbone(mixer, options.width, options.layers), device)
        for b in options.batches:
            rows += measured(mixer, model, b, options, about)
            if device.type == "cuda":
                record.write_rows("decode", rows)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
