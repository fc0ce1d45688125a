"""`longseq bench recall`: train a small model on a task of memory, and see how long, and how much, it remembers."""

import itertools
import shlex
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from seqmodels import presets
from seqmodels.config import AttentionConfig, BackboneConfig, HeadConfig, ModelConfig
from seqmodels.errors import InputError
from seqmodels.heads import IGNORED, LanguageModel
from seqmodels.tasks.synthetic.generators import Tokens, associative_recall, induction_heads, selective_copying

Task = Literal["copying", "induction", "mqar"]
Mixer = Literal["mamba", "mamba2", "s4d", "attention", "window", "lstm"]
Device = Literal["auto", "cpu", "cuda"]
Sizes = dict[str, int]
GENERATORS: dict[str, Callable[..., tuple[Tokens, Tokens]]] = {
    "copying": selective_copying,
    "induction": induction_heads,
    "mqar": associative_recall,
}
TRAIN, VALIDATION, TEST = range(3)  # streams of random numbers
READ_AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 20}  # tokens
LAYERS = 2  # as in all three tables
GROUP = 64  # sequences of a test that are drawn together
MEASURED = (  # what tells results apart
    "task", "mixer", "size", "seed", "d_model", "d_state", "window", "length", "shortest", "batch", "steps",
    "learning_rate", "warmup",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a task is learned and tested."""

    stages: tuple[Sizes, ...]
    "Sizes of the sequences to train on, as the generator takes them."
    tests: tuple[Sizes, ...]
    "Sizes of the sequences to test on."
    test_tokens: int
    "Tokens of a test, about; it has 64 to 1,024 sequences."
    d_model: int
    "Width."
    batch: int
    "Sequences per step."
    steps: int
    "Steps of the optimizer."
    learning_rate: float
    "Highest learning rate."
    final_rate: float = 1.0
    "Last learning rate, as a part of it; 1 means a constant rate."
    warmup: float = 0.0
    "Part of the steps in which the rate rises."
    weight_decay: float = 0.0
    "Decoupled weight decay."
    stage_steps: int = 1
    "Steps of a stage, after which the next one follows, after the last the first."
    set_size: int | None = None
    "Sequences of a stage that there are; then they come again. None: all are new."
    workers: int = 0
    "Processes that draw sequences."


def recipe(
    task: Task, mixer: Mixer, size: Literal["laptop", "gpu"], length: int | None = None, shortest: int | None = None
) -> Recipe:
    """The papers' recipe (gpu), or a smaller task for a CPU; `length` is that of training.

    Where the papers say nothing, as on Adam's constants and for windows and LSTM, it is what the neighbours have. The
    learning rate of MQAR rises in a tenth of the steps and falls to 1/8 as a cosine, where the paper's falls by an
    eighth after each of eight epochs. So does that of copying, where the paper's is constant in 400,000 steps, all at
    one length; here the lengths from `shortest` (64) to `length`, each twice the one before, take turns.
    """
    mamba = mixer in ("mamba", "mamba2")
    if task == "copying" and size == "gpu":  # Mamba paper, E.1, but for the shorter lengths, the rate and the steps
        length = length or 4096
        stages = tuple({"length": part} for part in _doubling(shortest or 64, length))
        return Recipe(
            stages=stages, tests=stages[-1:], test_tokens=1 << 22, d_model=64, batch=64, steps=4000 * len(stages),
            learning_rate=3e-3, final_rate=1 / 8, warmup=0.1, workers=4,
        )  # fmt: skip
    if task == "copying":
        length, size_of = length or 64, {"memorise": 4, "vocabulary": 8}
        stages = tuple({"length": part, **size_of} for part in _doubling(shortest, length))
        return Recipe(
            stages=stages, tests=stages[-1:], test_tokens=1 << 14, d_model=32, batch=32, steps=3000,
            learning_rate=2e-3, final_rate=1 / 8, warmup=0.1,
        )  # fmt: skip
    if task == "induction" and size == "gpu":  # Mamba paper, 4.1.2 and E.1: 25 "epochs" of 8,192 steps
        longest = 14 if mixer == "attention" else 20
        return Recipe(
            stages=tuple({"length": part} for part in _doubling(shortest, length or 256)),
            tests=tuple({"length": 1 << k} for k in range(6, longest + 1)), test_tokens=1 << 26,
            d_model=64 if mamba else 128, batch=8, steps=25 * 8192, learning_rate=1e-3 if mamba else 2e-4,
        )  # fmt: skip
    if task == "induction":
        return Recipe(
            stages=tuple({"length": part} for part in _doubling(shortest, length or 64)),
            tests=tuple({"length": 1 << k} for k in range(6, 13)), test_tokens=1 << 14, d_model=32, batch=16,
            steps=1200, learning_rate=5e-3 if mamba else 2e-3,
        )  # fmt: skip
    if size == "gpu":  # Mamba-2 paper, D.1: 8 epochs of 4 sets of 2^18 sequences, 2^18 tokens at a time
        length = length or 256
        stages = tuple({"length": length, "pairs": length // part} for part in (32, 16, 8, 4))
        return Recipe(
            stages=stages, tests=stages, test_tokens=1 << 18, d_model=64, batch=max(1, (1 << 18) // length),
            steps=8 * 4 * length, learning_rate=1e-2, final_rate=1 / 8, warmup=0.1, weight_decay=0.1,
            stage_steps=length, set_size=1 << 18, workers=4,
        )  # fmt: skip
    stages = tuple({"length": length or 32, "pairs": pairs, "vocabulary": 64} for pairs in (2, 4, 8))
    return Recipe(
        stages=stages, tests=stages, test_tokens=1 << 14, d_model=64, batch=64, steps=1500,
        learning_rate=1e-2 if mamba else 2e-3, final_rate=1 / 8,
    )  # fmt: skip


def _doubling(shortest: int | None, longest: int) -> list[int]:
    """shortest, 2 shortest, 4 shortest, ... below longest, and longest; longest alone without shortest."""
    shortest = shortest or longest
    return [*itertools.takewhile(lambda length: length < longest, (shortest << k for k in itertools.count())), longest]


def backbone(task: Task, mixer: Mixer, d_model: int, d_state: int | None, window: int) -> BackboneConfig:
    """Two layers, as in the papers' tables."""
    if mixer == "mamba":
        return presets.mamba(d_model, LAYERS, d_state=d_state or 16)
    if mixer == "mamba2":
        return presets.mamba2(d_model, LAYERS, d_state=d_state or 64, head_dim=min(64, 2 * d_model))
    if mixer == "s4d":
        return presets.s4d(d_model, LAYERS, d_state=d_state or 64)
    if d_state is not None:
        raise InputError(f"--d-state is {d_state}, but {mixer} has no state of that kind; leave it out")
    if mixer == "lstm":
        return presets.lstm(d_model, LAYERS)
    heads = 1 if task == "mqar" else 8  # Zoology's programs; Mamba paper, 4.1.2
    return presets.attention(d_model, LAYERS, num_heads=heads, window=window if mixer == "window" else None)


@dataclass(frozen=True, kw_only=True)
class RecallData:
    """Batches of a task for `seqmodels.training.fit`: each a function of the seed and its number alone."""

    generate: Callable[..., tuple[Tokens, Tokens]]
    recipe: Recipe
    seed: int = 0

    def train_batch(self, step: int) -> dict[str, torch.Tensor]:
        """Batch number `step`."""
        stages, set_size = self.recipe.stages, self.recipe.set_size
        stage = step // self.recipe.stage_steps % len(stages)
        if set_size is not None:
            step %= -(-set_size // self.recipe.batch) * len(stages)
        return self._batch(stages[stage], TRAIN, self.seed, step)

    def validation_batches(self) -> list[dict[str, torch.Tensor]]:
        """Four batches of the last stage, the same for every seed."""
        return [self._batch(self.recipe.stages[-1], VALIDATION, number) for number in range(4)]

    def _batch(self, sizes: Sizes, *stream: int) -> dict[str, torch.Tensor]:
        ids, targets = self.generate(np.random.default_rng(stream), self.recipe.batch, **sizes)
        return {"ids": torch.from_numpy(ids), "targets": torch.from_numpy(targets)}


@torch.inference_mode()
def accuracy(
    model: LanguageModel, generate: Callable[..., tuple[Tokens, Tokens]], sizes: Sizes, groups: int, at_once: int
) -> float:
    """The part of the answers that a model gets right, over `groups` of GROUP sequences, the same for every model.

    A group is read `at_once` tokens at a time: in stretches, each with the state that the one before has left, or, by
    attention, whose state grows, whole sequence after whole sequence.
    """
    whole = any(isinstance(mixer, AttentionConfig) for mixer in model.config.backbone.layers)
    right = count = 0
    for group in range(groups):
        ids, targets = map(torch.from_numpy, generate(np.random.default_rng((TEST, group)), GROUP, **sizes))
        length = ids.shape[1]
        rows = max(1, at_once // length) if whole else GROUP
        stretch = length if whole else max(1, at_once // GROUP)
        for some, answers in zip(ids.split(rows), targets.split(rows), strict=True):
            state = None
            for part, wanted in zip(some.split(stretch, 1), answers.split(stretch, 1), strict=True):
                x, state = model.backbone(part.to(model.device), state)
                asked = wanted != IGNORED
                said = model.logits(x[asked.to(model.device)]).argmax(-1).cpu()
                right += int((said == wanted[asked]).sum())
                count += int(asked.sum())
    return right / count


def train(task: Task, config: BackboneConfig, how: Recipe, run: Path, *, seed: int, device: Device) -> Path:
    """Trains a model, or goes on where a run with the same settings has stopped; the folder of the model."""
    from seqmodels.training import TrainingConfig, fit

    data = RecallData(generate=GENERATORS[task], recipe=how, seed=seed)
    vocabulary = how.stages[0].get("vocabulary", 8192 if task == "mqar" else 16)
    model = ModelConfig(vocab_size=vocabulary, backbone=config, head=HeadConfig(task="next_token"))
    training = TrainingConfig(
        max_steps=how.steps, learning_rate=how.learning_rate, final_rate=how.final_rate, warmup=how.warmup,
        weight_decay=how.weight_decay, betas=(0.9, 0.999), validate_every=max(50, how.steps // 10), seed=seed,
        device=device, keep="last", num_workers=how.workers, resume=True,
    )  # fmt: skip
    return fit(model, data, training, run)


def recall(
    *,
    task: Task = "induction",
    mixer: Mixer = "mamba",
    seed: int = 0,
    size: Literal["laptop", "gpu"] = "laptop",
    d_model: int | None = None,
    d_state: int | None = None,
    window: int | None = None,
    length: int | None = None,
    shortest: int | None = None,
    batch: int | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    warmup: float | None = None,
    run: Path | None = None,
    output: Path | None = None,
    device: Device = "auto",
) -> None:
    """Train a model on one of the papers' tasks of memory and measure what it remembers, and for how long.

        longseq bench recall --task induction --mixer mamba --seed 0                  a small one, for a CPU
        longseq bench recall --task induction --mixer mamba --seed 0 --size gpu       as in the paper

    copying: selective copying (Mamba paper, Table 1); induction: induction heads, trained at one length and tested up
    to a million steps (Table 2); mqar: multi-query associative recall (Zoology; Mamba-2 paper, Figure 8). All models
    have two layers. Flags left out are the paper's, or those of a smaller task for --size laptop.

    Args:
        task: Which task.
        mixer: Which layers: mamba, mamba2, s4d (the same at every step), attention, window (attention over a sliding
            window) or lstm.
        seed: Seed of the weights and of the training sequences; all models are tested on the same ones.
        size: laptop or gpu, the paper's size.
        d_model: Width.
        d_state: State size of mamba (16), mamba2 (64) or s4d (64).
        window: Steps that a sliding window sees; by default a quarter of the length that is trained.
        length: Length of the training sequences.
        shortest: Length of the shortest of them, not for mqar: lengths from it to --length, each twice the one before,
            take turns. By default 64 for copying with --size gpu, where the paper's are all of one length.
        batch: Sequences per step.
        steps: Steps of the optimizer.
        learning_rate: Highest learning rate.
        warmup: Part of the steps in which the learning rate rises, from 0 to below 1.
        run: Folder for checkpoints, logs and the model, in which a stopped run goes on; by default a temporary one.
        output: JSON file to which the result is added; by default benchmarks/results/[GPU/]recall.json in a checkout,
            recall.json here otherwise.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    import seqmodels
    from seqmodels.bench import results_folder
    from seqmodels.checkpoint import choose_device
    from seqmodels.display import aligned
    from seqmodels.record import add_rows, commit, device_name, versions

    for name in ("d_model", "d_state", "window", "length", "shortest", "batch", "steps"):
        if given.get(name, 1) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {given[name]}; expected at least 1")
    if not 0 <= given.get("warmup", 0) < 1:
        raise InputError(f"--warmup is {warmup}; expected a part of the steps, from 0 to below 1")
    on = choose_device(device)
    if shortest is not None and task == "mqar":
        raise InputError("--shortest is for copying and induction, not for --task mqar; leave it out")
    how = recipe(task, mixer, size, length, shortest)
    if shortest is not None and shortest > (longest := how.stages[-1]["length"]):
        raise InputError(f"--shortest is {shortest}, but the longest sequence has {longest} steps; give at most that")
    changes = {name: given[name] for name in ("d_model", "batch", "steps", "learning_rate", "warmup") if name in given}
    how = replace(how, **changes)
    config = backbone(task, mixer, how.d_model, d_state, window or max(1, how.stages[-1]["length"] // 4))
    for sizes in (*how.stages, *how.tests):
        GENERATORS[task](np.random.default_rng(0), 1, **sizes)  # refuses what does not fit before anything is trained
    began = time.perf_counter()
    with nullcontext(run) if run else TemporaryDirectory(prefix="recall-") as folder:
        trained = train(task, config, how, Path(folder), seed=seed, device=device)
        model = seqmodels.load(trained, device=on)
    trained_in, began = time.perf_counter() - began, time.perf_counter()
    tested = []
    for sizes in how.tests:
        groups = min(16, max(1, how.test_tokens // (GROUP * sizes["length"])))
        right = accuracy(model, GENERATORS[task], sizes, groups, READ_AT_ONCE[on.type])
        tested.append({**sizes, "sequences": GROUP * groups, "accuracy": round(right, 6)})
    gpu, first, longest = device_name(on), how.stages[0]["length"], how.stages[-1]["length"]
    row = {
        "task": task, "mixer": mixer, "size": size, "seed": seed, "d_model": how.d_model,
        "d_state": getattr(config.layers[0], "d_state", None), "window": getattr(config.layers[0], "window", None),
        "length": longest, "shortest": first if first < longest else None, "batch": how.batch, "steps": how.steps,
        "learning_rate": how.learning_rate, "warmup": how.warmup,
        "parameters": sum(p.numel() for p in model.parameters()), "tests": tested,
        "seconds": {"training": round(trained_in, 1), "tests": round(time.perf_counter() - began, 1)},
        "gpu": gpu, "versions": versions(), "commit": commit(), "command": _command(given),
    }  # fmt: skip
    print(aligned(tested, list(tested[0])), end="")
    print(add_rows(output or results_folder(gpu) / "recall.json", [row], MEASURED))


def _command(given: dict[str, Any]) -> str:
    """The command that was given, without what does not change its result."""
    words = ["longseq", "bench", "recall"]
    for name, value in given.items():
        if name not in ("run", "output", "device"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
