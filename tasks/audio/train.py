"""Train a generative model of recordings: a U-Net of Mamba-2 blocks over mu-law samples, told the labels."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqmodels.config import ConditionConfig, HeadConfig, ModelConfig, MultiscaleConfig
from seqmodels.errors import InputError
from seqmodels.heads import build
from seqmodels.presets import multiscale_mamba2
from seqmodels.tasks.audio.datasets import ClipData, tokenise
from seqmodels.tasks.audio.tables import open_recordings, parse_conditions, split_rows, split_rules
from seqmodels.tasks.audio.waveform import MuLaw
from seqmodels.training import TrainingConfig, first_process, fit

SPEEDS = (94, 97, 103, 106)  # percent of the recorded speed, pitch included


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which recordings to train on, and how."""

    table: Path | None = None
    'CSV table with a column "file" and labels; by default metadata.csv in the folder or beside the zip.'
    conditions: str = ""
    "Labels that the model is told: columns of the table, as column,... or name=column,..."
    test: str | None = None
    "Recordings left out: a rule column=value,value or a fraction; by default split=test if there is such a column."
    validation: str | None = None
    """Validation recordings: a rule such as index=5-9, or a fraction of what test leaves; by default split=validation
    if the table has such rows, else 0.1."""
    sample_rate: int = 8000
    "Hz; recordings at another rate are resampled."
    batch_tokens: int = 131072
    "Samples per batch, padding included."
    speed_change: bool = True
    "Whether half of the clips are taken up to 6 % slower or faster."
    flip: bool = False
    "Whether half of the clips change their sign."
    label_dropout: float = 0.1
    "Probability with which each label is withheld, so that the model can also do without."
    seed: int = 0
    "Seed of the split, the order, the variants and the withheld labels."


CLIPS = DataConfig()
RECIPE = TrainingConfig(max_steps=4000, learning_rate=2e-3, ema_decay=0.999)


def train(
    data: Path,
    run: Path,
    *,
    clips: DataConfig = CLIPS,
    training: TrainingConfig = RECIPE,
    widths: tuple[int, ...] = (128, 192, 256),
    depths: tuple[int, ...] = (4, 4, 6),
    pools: tuple[int, ...] = (4, 4),
    d_state: int = 64,
    head_dim: int = 64,
    dropout: float = 0.1,
) -> None:
    """Train a model that generates sound like some recordings, told their labels.

    The model is a causal U-Net of Mamba-2 blocks over single samples; run/model is the result.

    Args:
        data: A folder or zip of recordings, with a table of labels if there are any.
        run: Folder for checkpoints, logs and the model.
        clips: Which recordings, which labels, and how batches are made.
        training: How to train.
        widths: Width of each stage of the U-Net, the finest first.
        depths: Blocks of each stage: on the way down and again on the way up; the last stage is the centre.
        pools: Steps of each stage that make one step of the next.
        d_state: State size of the blocks.
        head_dim: Head size of the blocks; must divide twice every width.
        dropout: Dropout while training.
    """
    if not len(widths) == len(depths) == len(pools) + 1:
        raise InputError(
            f"{len(widths)} widths, {len(depths)} depths and {len(pools)} pools do not fit together; "
            "give as many depths as widths and one pool fewer"
        )
    examples, conditions, mu_law = load_data(data, clips)
    backbone = multiscale_mamba2(widths, depths, pools, dropout=dropout, d_state=d_state, head_dim=head_dim)
    config = model_config(backbone, conditions, mu_law)
    build(config)  # refuses sizes that do not fit before anything is written
    counts = f"{examples.train.clips} clips to train on, {examples.validation.clips} to validate"
    labels = ", ".join(f"{c.name} ({len(c.values)})" for c in conditions) or "none"
    if first_process():
        print(f"{counts}; labels: {labels}; {examples.steps_per_epoch()} batches per epoch", file=sys.stderr)
    folder = fit(config, examples, training, run)
    if first_process():
        print(folder)


def load_data(folder: Path, config: DataConfig) -> tuple[ClipData, tuple[ConditionConfig, ...], MuLaw]:
    """Training data, the conditions found in its table, and its tokens, from a folder or zip of recordings."""
    recordings = open_recordings(folder, config.table)
    conditions, ids = parse_conditions(recordings.rows, config.conditions)
    rules = split_rules(recordings.rows, config.test, config.validation)
    parts = split_rows(recordings.rows, **rules, seed=config.seed)
    if len(parts["validation"]) == 0:
        raise InputError(f"validation {rules['validation']!r} leaves no recordings to validate on; take a larger part")
    mu_law = MuLaw(sample_rate=config.sample_rate)
    train = recordings.select(parts["train"]).read(config.sample_rate)
    validation = recordings.select(parts["validation"]).read(config.sample_rate)
    data = ClipData(
        train=tokenise(train, mu_law, speeds=SPEEDS if config.speed_change else (), flip=config.flip),
        train_conditions=ids[parts["train"]],
        validation=tokenise(validation, mu_law),
        validation_conditions=ids[parts["validation"]],
        not_given=np.array([len(condition.values) for condition in conditions], dtype=np.int64),
        batch_tokens=config.batch_tokens,
        seed=config.seed,
        label_dropout=config.label_dropout,
    )
    return data, conditions, mu_law


def model_config(backbone: MultiscaleConfig, conditions: tuple[ConditionConfig, ...], mu_law: MuLaw) -> ModelConfig:
    """The model of sound over a backbone."""
    return ModelConfig(
        vocab_size=mu_law.vocab_size,
        backbone=backbone,
        head=HeadConfig(task="next_token"),
        conditions=conditions,
        tokenizer=mu_law.to_dict(),
    )
