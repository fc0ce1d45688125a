"""Training through Lightning: parameter groups, schedule, validation, checkpoints, and exact resume.

A data set is anything with `train_batch(number)`, a pure function of the number, and `validation_batches()`. Step s
reads the batches s * a * w ... (s + 1) * a * w - 1, for `accumulate` a and w readers, of which reader r takes every
w-th from r on: two readers make the steps of one with twice the `accumulate`. With `step_tokens`, a step has as many
batches, the same number for each reader, as come closest to that many tokens. Dropout is seeded by the number. This
makes a resumed run repeat the uninterrupted one, also after a kill.

The loss of a step is the mean over all that counts in it (targets, labelled sequences), however unequal its batches.

A reader is a process or, with `sequence_parallel` above 1, that many of them: all get the same batches, each takes its
stretch of every sequence (seqmodels/sequence_parallel.py), and the step is that of one process.

What goes wrong on the way: a loss or gradient that is no number ends the run before it reaches a checkpoint (it is
looked at one step later, so that the GPU need not wait for the host); a batch that does not fit into the GPU's memory
is read in parts, whose gradients add up to the same step.
"""

import dataclasses
import gc
import itertools
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure, tree_unflatten
from torch.utils.data import DataLoader, Dataset

from seqmodels.backbone import Layer, recompute_layers
from seqmodels.checkpoint import read_json, save
from seqmodels.config import ModelConfig, to_dict
from seqmodels.errors import InputError
from seqmodels.files import make_folder, write_json
from seqmodels.graphs import GradientGraphs
from seqmodels.heads import Model, build
from seqmodels.sequence_parallel import check_shareable, parallelise, split
from seqmodels.transfer import take_over

LOG_EVERY = 10  # steps
Batch = dict[str, Tensor]
Tune = Literal["full", "head"]


class TrainingData(Protocol):
    """What a data set offers to `fit`; batches are what the model's `loss` takes.

    For `step_tokens` it also has `tokens(step)`: how many tokens batch number `step` has, padding left out.
    """

    def train_batch(self, step: int) -> Batch:
        """Batch number `step`, always the same for the same number."""
        ...

    def validation_batches(self) -> list[Batch]:
        """The fixed validation batches."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train."""

    max_steps: int = 1000
    "Optimizer steps."
    learning_rate: float = 1e-3
    "Peak learning rate; warmed up linearly, then a cosine down to `final_rate`."
    final_rate: float = 0.0
    "Learning rate at the end, as a part of the peak."
    warmup: float = 0.1
    "Part of the steps that the warm-up takes."
    weight_decay: float = 0.1
    "Decoupled weight decay; never on A_log, D, norms and biases."
    betas: tuple[float, float] = (0.9, 0.95)
    "AdamW's decay rates."
    gradient_clip: float = 1.0
    "Largest norm of the gradient; 0 means no clipping."
    accumulate: int = 1
    "Batches whose gradients make one step."
    step_tokens: int = 0
    """Tokens (bases, samples; without padding) whose gradients make one step, about: batches are added up over all GPUs
    until they come closest to it. 0 means as many batches as `accumulate` says."""
    precision: Literal["32", "bf16"] = "32"
    "Arithmetic: float32, or bfloat16 with float32 weights."
    carry_state: bool = False
    "Rows of a batch go on from those of the batch before: endless streams, gradients cut between batches."
    recompute: int = 0
    "Tokens whose activations are kept at a time, the others being computed again going back; 0 keeps all."
    ema_decay: float = 0.0
    """Decay of the exponential moving average of the weights that is validated and kept; 0 means none. After n steps it
    is at most (1 + n) / (10 + n), so that the average of a short run does not lag behind."""
    validate_every: int = 200
    "Steps between validations; each also writes a checkpoint to resume from."
    patience: int | None = None
    "Validations without improvement after which to stop; None means never."
    seed: int = 0
    "Seed of the initial weights and of dropout."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    "Where to train."
    devices: int = 1
    "GPUs (or processes on a CPU) per node. Each reads its own batches: accumulate * devices * num_nodes make a step."
    sequence_parallel: int = 1
    "GPUs that share each sequence, a stretch on each; they read the same batches, as many fewer make a step."
    num_nodes: int = 1
    "Machines; start the same command on each with torchrun, which then also says how many processes there are."
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    "How several devices share: ddp (also auto) copies the model to each; fsdp2 splits weights and optimizer state too."
    num_workers: int = 0
    "Processes that prepare batches; 0 means the training process itself."
    keep: Literal["best", "last", "both"] = "best"
    "Weights to export: those with the best validation loss, the last ones, or both: to run/model and run/last."
    weights: Literal["float32", "bfloat16"] = "float32"
    "Number format of the weights in the exported model."
    resume: bool = False
    "Go on from the run folder's last checkpoint."

    @property
    def readers(self) -> int:
        """Groups of processes that read batches of their own; without sequence parallelism each process is one."""
        return self.devices * self.num_nodes // self.sequence_parallel

    @property
    def batches_per_step(self) -> int:
        """Batches that make one step, over all processes."""
        return self.accumulate * self.readers


def fit(
    config: ModelConfig,
    data: TrainingData,
    training: TrainingConfig,
    run: Path,
    *,
    card: str = "",
    start_from: str | None = None,
    tune: Tune = "full",
) -> Path:
    """Train a model and return the folder run/model of the weights with the best validation loss (or the last).

    With `keep` "both", run/last holds the last ones.

    `start_from` is a checkpoint (name or folder) whose tensors are taken over where they fit (seqmodels/transfer.py).
    With `tune` "head" the backbone stays as it is there, and only the head learns.

    The run folder also holds run.json (both configurations, `start_from` and `tune` where given), logs/ (CSV and
    TensorBoard) and checkpoints/.
    """
    training = as_started(training)
    if training.carry_state and config.head.task != "next_token":
        raise InputError(f"carry_state is for next-token models, not for task {config.head.task!r}; leave it out")
    if training.step_tokens and not hasattr(data, "tokens"):
        raise InputError("step_tokens needs data that say how many tokens a batch has; use accumulate instead")
    model = build(config, seed=training.seed)
    if training.sequence_parallel > 1:
        check_shareable(model)
    if tune == "head" and start_from is None:
        raise InputError("tune='head' leaves the backbone as it is, which then has to come from start_from; name one")
    last = _prepare_run(config, training, run, tune, start_from)
    if start_from is not None and last is None:
        taken, there = take_over(model, start_from)
        if first_process():
            print(f"took {taken} of {there} tensors from {start_from}", file=sys.stderr)
    if tune == "head":
        model.backbone.requires_grad_(False)
    if training.recompute:
        one = training.devices * training.num_nodes == 1  # sharded or shared sequences are read in one stretch
        recompute_layers(model, training.recompute if one else 0)
    task = (_ShardedTask if training.strategy == "fsdp2" else _Task)(model, data, training)
    kept: dict[str, Any] = {"dirpath": run / "checkpoints", "enable_version_counter": False}
    checkpoints = [
        ModelCheckpoint(filename="best", monitor="val_loss", save_on_train_epoch_end=True, **kept),
        ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **kept),
    ]
    callbacks: list[Callback] = [_ReportLines(training.max_steps)]
    if training.ema_decay:
        callbacks.append(_MovingAverage(training.ema_decay))
    if training.patience is not None:
        callbacks.append(EarlyStopping("val_loss", patience=training.patience))
    bar = sys.stderr.isatty()
    with _quiet_lightning():
        trainer = pl.Trainer(
            max_steps=training.max_steps,
            max_epochs=-1,
            accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[training.device],
            devices=training.devices,
            num_nodes=training.num_nodes,
            strategy=_strategy(training),
            use_distributed_sampler=False,  # the task gives each process its own batches
            precision={"32": "32-true", "bf16": "bf16-mixed"}[training.precision],  # pyright: ignore
            reload_dataloaders_every_n_epochs=1,  # an epoch is what lies between two validations
            num_sanity_val_steps=0,
            log_every_n_steps=LOG_EVERY,
            enable_progress_bar=bar,
            enable_model_summary=False,
            callbacks=[*callbacks, *checkpoints],
            plugins=[_AtomicIO()],
            logger=[CSVLogger(run, "logs"), TensorBoardLogger(run, "logs")],
        )
        on_gpu = trainer.accelerator.auto_device_count() and trainer.strategy.root_device.type == "cuda"
        with _tf32() if on_gpu else nullcontext():
            trainer.fit(task, ckpt_path=last, weights_only=True if last else None)
    if not trainer.is_global_zero:
        return run / "model"
    model, prefix = build(config), "model."
    exports = [("last", "last"), ("best", "model")] if training.keep == "both" else [(training.keep, "model")]
    for name, folder in exports:
        weights = torch.load(run / "checkpoints" / f"{name}.ckpt", map_location="cpu", weights_only=True)
        model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in weights["state_dict"].items() if k.startswith(prefix)}
        )
        save(model, run / folder, card=card or None, dtype=getattr(torch, training.weights))
    return run / "model"


def first_process() -> bool:
    """Whether this is the one process, or the first of several that train together: the one that writes and reports."""
    return rank_zero_only.rank == 0


def as_started(training: TrainingConfig) -> TrainingConfig:
    """The same with the number of processes that torchrun has started, if it has."""
    started, here = os.environ.get("TORCHELASTIC_RUN_ID"), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if started is not None:
        nodes = int(os.environ["WORLD_SIZE"]) // here
        training = dataclasses.replace(training, devices=here, num_nodes=nodes)
    processes, shared = training.devices * training.num_nodes, training.sequence_parallel
    if shared < 1 or processes % shared:
        raise InputError(
            f"sequence_parallel is {shared}, but there are {processes} processes; give a divisor of it, or other "
            "--training.devices"
        )
    if training.step_tokens < 0 or (training.step_tokens and training.accumulate != 1):
        raise InputError(
            f"step_tokens is {training.step_tokens} and accumulate {training.accumulate}; only one of them can say "
            "what makes a step"
        )
    if training.strategy == "fsdp2" and training.ema_decay:
        raise InputError(
            "fsdp2 keeps no moving average of weights; give --training.ema-decay 0 or --training.strategy ddp"
        )
    if training.carry_state and training.readers > 1:
        raise InputError(
            "carry_state reads one batch after the other and works with one process, or with several that share each "
            "sequence (sequence_parallel); leave one of them out"
        )
    return training


def _strategy(training: TrainingConfig) -> Any:
    world = training.devices * training.num_nodes
    if training.strategy == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return "ddp" if world > 1 else "auto"


def _prepare_run(
    config: ModelConfig, training: TrainingConfig, run: Path, tune: Tune, start_from: str | None
) -> Path | None:
    """Create the run folder, or check that the one to resume was started the same way; its last checkpoint if any."""
    settings = {"model": to_dict(config), "training": _settings(training)}
    settings |= {} if tune == "full" else {"tune": tune}
    settings |= {} if start_from is None else {"start_from": start_from}
    record, last = run / "run.json", run / "checkpoints" / "last.ckpt"
    if not first_process():
        return last if last.exists() else None
    if record.exists() and not training.resume:
        raise InputError(f"{run}: a run is already here; resume it with --training.resume or choose another folder")
    if record.exists() and read_json(record) != json.loads(json.dumps(settings)):
        raise InputError(f"{run}: this run was started with other settings (run.json); repeat them to resume it")
    make_folder(run)
    write_json(record, settings)
    return last if last.exists() else None


def _settings(training: TrainingConfig) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(training).items() if k not in ("resume", "device", "num_workers")}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: no decay on A, D, dt, norms and biases, as in the papers' recipes."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # frozen
            continue
        bare = name.endswith(("A_log", "A_imag")) or parameter.dim() < 2
        (plain if bare else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def schedule(step: int, max_steps: int, warmup: float, final: float = 0.0) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine to `final` at max_steps."""
    rising = max(1, round(warmup * max_steps))
    if step < rising:
        return (step + 1) / rising
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, max_steps - rising))))
    return final + (1 - final) * falling


class _Steps(Dataset):
    """Steps as a map-style data set: of each, this process's batches with their numbers."""

    def __init__(self, data: TrainingData, numbers: list[range]) -> None:
        self.data, self.numbers = data, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> list[tuple[int, Batch]]:
        return [(number, self.data.train_batch(number)) for number in self.numbers[index]]


class _Task(pl.LightningModule):
    """One optimizer step per call of `training_step`, with the gradients of all its batches."""

    def __init__(self, model: Model, data: TrainingData, training: TrainingConfig) -> None:
        super().__init__()
        self.automatic_optimization = False  # so that a step can be tried again in parts
        self.model, self.data, self.training_config = model, data, training
        self.read = 0  # batches in the steps so far, of all readers
        self.parts = 1  # into which each batch is cut, since a whole one did not fit into memory
        self.state: Any = None  # that the next batch goes on from, if it is carried; as a list of tensors when loaded
        self.mesh: DeviceMesh | None = None  # readers x processes that share their sequences
        self.graphs: GradientGraphs | None = None  # of steps with one batch, on one GPU
        self.unchecked: tuple[int, Callable[[], list[float]]] | None = None  # the last step, its loss and norm

    def setup(self, stage: str) -> None:
        training, device = self.training_config, self.trainer.strategy.root_device.type
        readers, shared = training.readers, training.sequence_parallel
        apart = training.carry_state or training.recompute or training.strategy == "fsdp2"
        if device == "cuda" and self.trainer.world_size == 1 and not apart:
            self.graphs = GradientGraphs(self.model)
        if shared > 1:  # neighbours share: the links within a node are the fastest
            self.mesh = init_device_mesh(device, (readers, shared), mesh_dim_names=("data", "sequence"))
            parallelise(self.model, self.mesh)

    @property
    def reader(self) -> int:
        """The number of the reader to which this process belongs."""
        return self.trainer.global_rank // self.training_config.sequence_parallel

    def train_dataloader(self) -> DataLoader:
        training, done = self.training_config, self.trainer.global_step
        bounds = [self.read]
        for _ in range(min(training.validate_every, training.max_steps - done)):
            bounds.append(_end_of_step(self.data, training, bounds[-1]))
        readers = training.readers
        steps = _Steps(self.data, [range(a + self.reader, b, readers) for a, b in itertools.pairwise(bounds)])
        pin = self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(steps, batch_size=None, num_workers=training.num_workers, pin_memory=pin)

    def val_dataloader(self) -> DataLoader:
        batches, readers = self.data.validation_batches(), self.training_config.readers
        own = [(batch, True) for batch in batches[self.reader :: readers]]
        if len(own) < -(-len(batches) // readers):  # all readers take as many; this one does not count
            own.append((batches[0], False))
        return DataLoader(own, batch_size=None)  # pyright: ignore

    def training_step(self, numbered: list[tuple[int, Batch]], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        numbers, batches = zip(*numbered, strict=True)
        values = None
        while values is None:
            optimizer.zero_grad()
            with suppress(torch.OutOfMemoryError):
                values = self._gradients(numbers, batches)
            if values is None:  # only here the traceback no longer holds the activations
                optimizer.zero_grad()
                if self.graphs is None:
                    self._halve(batches)
                self.graphs = None  # their memory is given back first
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.training_config.gradient_clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of all processes
        number, arriving = self.trainer.global_step + 1, sent(torch.stack([values["loss"], norm]))
        optimizer.step()
        self._check()  # of the step before, while the GPU computes this one
        self.unchecked = number, arriving
        self.lr_schedulers().step()  # pyright: ignore
        readers = self.training_config.readers
        self.read = (numbers[-1] // readers + 1) * readers
        if self.trainer.is_last_batch or self.global_step % LOG_EVERY == 0:  # nobody sees the others
            self.log_dict({f"train_{name}": value for name, value in values.items()}, batch_size=1)

    def _gradients(self, numbers: Sequence[int], batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Adds up the gradients of the mean of the loss over the terms of all batches, and gives the means."""
        trainer, values, shared = self.trainer, dict[str, Tensor](), self.training_config.sequence_parallel
        if self.graphs is not None and len(batches) == 1 and self.parts == 1:
            torch.manual_seed(self._seed(numbers[0]))
            found = self.graphs(batches[0])
            if found is not None:
                del found["count"]
                return found
        cut = [_split(self._own(batch), self.parts) for batch in batches]
        weights = [[self.model.terms(part) for part in parts] for parts in cut]
        mean = trainer.strategy.reduce(sum(map(sum, weights)).float(), reduce_op="mean")  # of a process
        mean = mean.clamp(min=1 / trainer.world_size)
        state = self._state_before(self._own(batches[0]))
        for number, parts, terms in zip(numbers, cut, weights, strict=True):
            torch.manual_seed(self._seed(number))
            for part, own in zip(parts, terms, strict=True):
                share = own / mean
                if self.training_config.carry_state:
                    loss, metrics, state = self.model.loss_from(part, state)  # pyright: ignore
                    state = tree_map_only(Tensor, Tensor.detach, state)
                else:
                    loss, metrics = self.model.loss(part)
                last = number == numbers[-1] and part is parts[-1]
                with nullcontext() if last else self._apart():
                    self._backward(loss * share * shared)  # all processes' mean, but a reader's are parts of one sum
                for name, value in {"loss": loss.detach(), **metrics}.items():
                    values[name] = values.get(name, 0) + share * value.detach()
        del values["count"]
        self.state = state  # only here: a step may be tried again
        return {name: trainer.strategy.reduce(value, reduce_op="mean") for name, value in values.items()}

    def _seed(self, number: int) -> int:
        """Of dropout: it depends on the batch's number (and the stretch) alone, so that a resumed run repeats it."""
        shared = self.training_config.sequence_parallel
        return self.training_config.seed * 1_000_003 + number * shared + self.trainer.global_rank % shared

    def _own(self, batch: Batch) -> Batch:
        """What this process computes of a batch: its stretch of each sequence, if several share them."""
        return batch if self.mesh is None else split(batch, self.mesh)

    def _state_before(self, batch: Batch) -> Any:
        """The carried state; one that was loaded gets its form back, which a checkpoint cannot hold."""
        if isinstance(self.state, list):
            with torch.no_grad():
                *_, form = self.model.loss_from(batch, None)  # pyright: ignore
            leaves = tree_map_only(Tensor, lambda t: t.to(self.device), self.state)
            self.state = tree_unflatten(leaves, tree_structure(form))
        return self.state

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):  # gradients have the types of what they belong to
            self.manual_backward(loss)

    def _apart(self) -> Any:
        """A context in which gradients stay in this process: they are exchanged once per step."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()

    def _halve(self, batches: Sequence[Batch]) -> None:
        """Cuts this and all later batches into twice as many parts, or says that one sequence is too long."""
        if self.trainer.world_size > 1:
            raise InputError(
                "out of memory, and several processes cannot cut a batch into parts while the others wait: use smaller "
                "batches and a larger --training.accumulate, or share each sequence (--training.sequence-parallel)"
            )
        if self.training_config.carry_state:
            raise InputError(
                "out of memory, and batches with a carried state are not cut: give fewer rows or steps each"
            )
        where, widest = f"step {self.trainer.global_step + 1}", max(batches, key=lambda batch: batch["ids"].shape[1])
        if self.parts >= max(len(batch["ids"]) for batch in batches):
            length = widest["ids"].shape[1]
            fits = self._length_that_fits(widest)
            raise InputError(
                f"{where}: a sequence of {length} tokens does not fit into memory; by what shorter ones took, "
                f"{fits} tokens would fit: use shorter sequences, --training.recompute or a smaller model"
            )
        self.parts *= 2
        print(f"{where}: out of memory; each batch is read in {self.parts} parts from now on", file=sys.stderr)

    def _length_that_fits(self, batch: Batch) -> int:
        """Tokens of the longest sequence for which there is memory, which grows linearly: from two short ones."""
        length, took = batch["ids"].shape[1] // 8, list[tuple[int, int]]()
        while len(took) < 2 and length > 1:
            try:
                took.append((length, _peak_memory(partial(self._try, _shortened(batch, length)))))
            except torch.OutOfMemoryError:
                took.clear()
            self.zero_grad()
            length //= 2
        if len(took) < 2:
            return 0
        (long, at_long), (short, at_short) = took
        per_token = max(1.0, (at_long - at_short) / (long - short))
        return max(0, int(long + 0.95 * (_available_memory() - at_long) / per_token))  # 5 % are lost in gaps

    def _try(self, batch: Batch) -> None:
        self._backward(self.model.loss(batch)[0])

    def on_validation_start(self) -> None:
        self._check()

    def _check(self) -> None:
        """Ends the run where the loss, or the gradient, of the step that was not looked at yet is no number."""
        if self.unchecked is None:
            return
        (number, arriving), self.unchecked = self.unchecked, None
        loss, norm = arriving()
        if math.isfinite(loss + norm):
            return
        last = Path(self.trainer.checkpoint_callbacks[-1].dirpath) / "last.ckpt"  # pyright: ignore
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        raise InputError(
            f"step {number}: the loss is {loss:g}, the norm of its gradient {norm:g}; {kept}. "
            "Lower --training.learning-rate, or look at the data"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["read"], checkpoint["parts"] = self.read, self.parts
        if self.state is not None:
            checkpoint["state"] = self.state if isinstance(self.state, list) else tree_leaves(self.state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.read, self.parts, self.state = checkpoint["read"], checkpoint["parts"], checkpoint.get("state")

    def validation_step(self, batch: tuple[Batch, bool], batch_idx: int) -> None:
        loss, metrics = self.model.loss(self._own(batch[0]))
        shown = {f"val_{k}": v.float() for k, v in metrics.items() if k != "count"}
        self.log_dict({"val_loss": loss, **shown}, batch_size=int(metrics["count"]) * batch[1], sync_dist=True)

    def configure_optimizers(self) -> Any:
        training = self.training_config
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, training.weight_decay), lr=training.learning_rate, betas=training.betas,
            fused=self.trainer.strategy.root_device.type == "cuda",
        )  # fmt: skip
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: schedule(step, training.max_steps, training.warmup, training.final_rate)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _ShardedTask(_Task):
    """The same with weights, gradients and optimizer state split over the processes (FSDP2), layer by layer."""

    def configure_model(self) -> None:
        for layer in self.model.modules():
            if isinstance(layer, Layer):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])
        register_fsdp_forward_method(self.model, "loss_from" if self.training_config.carry_state else "loss")


def _end_of_step(data: Any, training: TrainingConfig, start: int) -> int:
    """Number of the batch after the last of the step that begins with batch `start`."""
    if not training.step_tokens:
        return start + training.batches_per_step
    stop, read = start, 0
    while True:
        more = sum(data.tokens(number) for number in range(stop, stop + training.readers))
        if stop > start and read + more / 2 > training.step_tokens:  # closer without them
            return stop
        stop, read = stop + training.readers, read + more


def sent(values: Tensor) -> Callable[[], list[float]]:
    """Numbers on their way to the host. What is given waits for them, but not for what the GPU is told later."""
    if not values.is_cuda:
        return values.tolist
    here, arrived = torch.empty_like(values, device="cpu", pin_memory=True), torch.cuda.Event()
    here.copy_(values, non_blocking=True)
    arrived.record()

    def wait() -> list[float]:
        arrived.synchronize()
        return here.tolist()

    return wait


def _split(batch: Batch, parts: int) -> list[Batch]:
    """A batch cut into at most `parts` parts of nearly as many rows."""
    pieces = {name: tensor.tensor_split(min(parts, len(tensor))) for name, tensor in batch.items()}
    return [dict(zip(pieces, part, strict=True)) for part in zip(*pieces.values(), strict=True)]


def _shortened(batch: Batch, length: int) -> Batch:
    """The first row of a batch, cut to its first tokens."""
    whole = batch["ids"].shape[1:]
    row = {name: tensor[:1, :length] if tensor.shape[1:] == whole else tensor[:1] for name, tensor in batch.items()}
    return row | ({"lengths": row["lengths"].clamp(max=length)} if "lengths" in row else {})


def _peak_memory(work: Callable[[], None]) -> int:
    """Bytes that the GPU's memory held at most during `work`."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def _available_memory() -> int:
    """Bytes of the GPU's memory that this process can have."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


class _MovingAverage(WeightAveraging):
    """The exponential moving average of the weights, where they are; all of them in a few kernels."""

    def __init__(self, decay: float) -> None:
        def average(kept: list[Tensor], new: list[Tensor], _: Tensor) -> None:
            steps = int(self._average_model.n_averaged)  # pyright: ignore
            torch._foreach_lerp_(kept, new, 1 - min(decay, (1 + steps) / (10 + steps)))

        super().__init__(use_buffers=False, multi_avg_fn=average)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """The model is still on the CPU now; its average would stay there, and each step would fetch the weights."""
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:  # its count stays here, to be read without waiting for the GPU
            self._average_model.n_averaged = torch.tensor(0)


class _AtomicIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it: a kill leaves the old one or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        temporary = f"{path}.part"
        super().save_checkpoint(checkpoint, temporary, storage_options)
        os.replace(temporary, path)


class _ReportLines(Callback):
    """One line on stderr per validation."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.started, self.first = time.monotonic(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started, self.first = time.monotonic(), trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        seconds = time.monotonic() - self.started
        rate = (trainer.global_step - self.first) / max(seconds, 1e-9)
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.endswith(("_step", "_epoch"))}
        shown = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        print(f"step {trainer.global_step}/{self.max_steps}  {shown}  {rate:.2f} steps/s", file=sys.stderr, flush=True)


@contextmanager
def _tf32() -> Iterator[None]:
    """Float32 products of a GPU by its tensor cores, 10 bits of mantissa each, here and nowhere after."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's advice on things that are so on purpose here (workers, epochs of changing length)."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing here works in place on its outputs
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
