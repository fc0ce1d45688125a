"""Bits per base of an unseen genome against parameters and context, at equal compute: Mamba, Mamba-2, attention.

    python benchmarks/scaling_law.py $LONGSEQ_DATA/genomes/enterobacteria runs/law     # results/GPU/scaling_law.json
    python benchmarks/scaling_law.py $LONGSEQ_DATA/genomes/enterobacteria runs/tiny --widths 16 --contexts 256 1024
        --context-width 16 --tokens 131072 --step 8192 --validated 65536               # on a CPU

Models that predict the next base are trained on Salmonella and three Klebsiella and measured on the beginning of
E. coli K-12 (at most 84 % identity), in windows as long as those that they were trained on. Mamba and Mamba-2 have 5
layers, Transformers 3, which are about as many parameters. A model is trained for as many steps as have the compute
that Mamba-2 of its width needs for --tokens bases: per base 6 operations for each parameter, and three times what its
layers do forward beside their weights: 2 l d in causal attention over l bases, q (n + h p) + 4 n h p in Mamba-2 with
chunks of q, 11 e n in Mamba's scan. The learning rate is 1 / (2 d), at most 0.004, for all alike. What is in the
results already is not trained again, and a run that was stopped goes on. A row of `counting` is the best Markov chain.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import record
import torch

import seqmodels
from seqmodels.checkpoint import choose_device
from seqmodels.config import AttentionConfig, BackboneConfig, HeadConfig, Mamba2Config, MixerConfig, ModelConfig
from seqmodels.errors import InputError
from seqmodels.presets import attention, mamba, mamba2
from seqmodels.tasks.genomics.genome import Genome, Stretch, read_genome, whole_records
from seqmodels.tasks.genomics.markov import reference_bits
from seqmodels.tasks.genomics.pretrain import GenomeData, validation_bits
from seqmodels.tasks.genomics.tokens import TOKENIZER, VOCAB_SIZE
from seqmodels.training import TrainingConfig, fit

HELD_OUT = "ecoli_K12_MG1655.fa.gz"
TRAINED_ON = (
    "salmonella_LT2.fa.gz",
    "kpneumoniae_NTUH-K2044.fa.gz",
    "kquasipneumoniae_MGH44.fa.gz",
    "kvariicola_342.fa.gz",
)
MIXERS = ("mamba2", "mamba", "attention")


def backbone(mixer: str, d: int) -> BackboneConfig:
    """Of about as many parameters for each mixer."""
    if mixer == "attention":
        return attention(d, 3, num_heads=max(1, d // 32))
    return mamba(d, 5) if mixer == "mamba" else mamba2(d, 5, d_state=64, head_dim=min(64, 2 * d))


def language_model(mixer: str, d: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCAB_SIZE, backbone=backbone(mixer, d), head=HeadConfig(task="next_token"), tokenizer=TOKENIZER
    )


def beside_weights(mixer: MixerConfig, d: int, l: int) -> float:
    """Operations of a layer forward for each of l tokens, but for those with its weights."""
    if isinstance(mixer, AttentionConfig):
        return 2 * l * d
    inner, n = mixer.expand * d, mixer.d_state
    return mixer.chunk_size * (n + inner) + 4 * n * inner if isinstance(mixer, Mamba2Config) else 11 * n * inner


def operations(config: ModelConfig, l: int) -> tuple[float, int]:
    """Of training, per token in sequences of l; and the parameters."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in seqmodels.build(config).parameters())
    own = sum(beside_weights(mixer, config.backbone.d_model, l) for mixer in config.backbone.layers)
    return 6 * parameters + 3 * own, parameters


def divided(genome: Genome, validated: int) -> tuple[list[Stretch], list[Stretch]]:
    """All of what is trained on, and the first bases of what is held out, whose record comes first."""
    held_out, *rest = whole_records(genome)
    if validated > len(held_out):
        raise InputError(f"--validated is {validated}, but {HELD_OUT} has {len(held_out)} bases; give fewer")
    return rest, [Stretch(held_out.record, 0, validated)]


def one(mixer: str, d: int, context: int, parts: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures a model: what a row says of it."""
    config, device = language_model(mixer, d), choose_device(options.device).type
    each, parameters = operations(config, context)
    budget = operations(language_model("mamba2", d), context)[0] * options.tokens
    steps = max(1, round(budget / (each * options.step)))
    data = GenomeData(
        *parts, context, batch_tokens=options.step, validation_windows=options.validated // context, seed=options.seed
    )
    training = TrainingConfig(
        max_steps=steps, learning_rate=min(4e-3, 0.5 / d), validate_every=steps, keep="last", seed=options.seed,
        precision="bf16" if device == "cuda" else "32", device=device, resume=True,
    )  # fmt: skip
    started = time.perf_counter()
    model = fit(config, data, training, options.runs / f"{mixer}-{d}-{context}-{options.tokens}-{options.seed}")
    return {
        "parameters": parameters, "steps": steps, "bases": steps * options.step,
        "petaflop": each * steps * options.step / 1e15, "bits": round(validation_bits(model, data, device), 5),
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def counting(context: int, parts: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any]:
    """The best Markov chain of the same training bases on the same windows."""
    genome, training, validation = parts
    data = GenomeData(
        genome,
        training,
        validation,
        context,
        batch_tokens=options.step,
        validation_windows=options.validated // context,
    )
    bases = [genome.bases(stretch.record, stretch.start, stretch.end) for stretch in training]
    order, bits = reference_bits(bases, data.validated, masked=False)
    return {"order": order, "bases": sum(map(len, bases)), "bits": round(bits, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("genomes", type=Path, help="folder of the enterobacteria")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MIXERS)
    parser.add_argument("--widths", type=int, nargs="+", default=(64, 128, 256, 512), help="at the first context")
    parser.add_argument("--contexts", type=int, nargs="+", default=(1024, 8192, 65536))
    parser.add_argument("--context-width", type=int, default=256, help="width at the other contexts")
    parser.add_argument("--tokens", type=int, default=3 << 22, help="bases that Mamba-2 is trained on")
    parser.add_argument("--step", type=int, default=1 << 16, help="bases per step")
    parser.add_argument("--validated", type=int, default=1 << 20, help="bases of the held-out genome")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    about = record.origin(options.commit)
    genome = read_genome([options.genomes / name for name in (HELD_OUT, *TRAINED_ON)], options.runs)
    parts = (genome, *divided(genome, options.validated))
    path = record.RESULTS / record.folder_of(about["gpu"]) / "scaling_law.json"
    there = {(json.dumps(row["shape"]), row["l"]) for row in (json.loads(path.read_text()) if path.exists() else [])}
    first = options.contexts[0]
    wanted = [(mixer, d, first) for d in options.widths for mixer in options.mixers]
    wanted += [(mixer, options.context_width, l) for l in options.contexts[1:] for mixer in options.mixers]
    for mixer, d, context in [("counting", 0, first), *wanted]:
        shape = {"mixer": mixer} if mixer == "counting" else {"mixer": mixer, "d": d, "seed": options.seed}
        shape |= {"tokens": options.tokens, "step": options.step, "validated": options.validated}
        if (json.dumps(shape), context) in there:
            print(f"{mixer} of width {d} at {context} is in {path}", flush=True)
            continue
        found = counting(context, parts, options) if mixer == "counting" else one(mixer, d, context, parts, options)
        row = {"op": "scaling_law", "impl": "ours", "shape": shape, "l": context, **found, **about}
        print(f"{mixer:9} {d:4} {context:6} {json.dumps(found)}", flush=True)
        record.write_rows("scaling_law", [row])


if __name__ == "__main__":
    main()
