"""Train models of recordings over mu-law samples: generative ones, told labels or text, and classifiers."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqmodels.checkpoint import read, resolve
from seqmodels.config import BackboneConfig, ConditionConfig, HeadConfig, ModelConfig, MultiscaleConfig
from seqmodels.errors import InputError
from seqmodels.heads import build
from seqmodels.tasks.audio.backbones import Block, choose_backbone
from seqmodels.tasks.audio.datasets import ClipData, LabelData, lay_out
from seqmodels.tasks.audio.tables import open_recordings, parse_conditions, split_rows, split_rules, texts_of
from seqmodels.tasks.audio.waveform import MuLaw, mu_law_of
from seqmodels.training import TrainingConfig, first_process, fit

TEXT_MULTIPLE = 16  # tokens of text are a multiple of this, so that prompts may be a little longer than those known


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which recordings to train on, and how."""

    table: Path | None = None
    'CSV table with a column "file" and labels; by default metadata.csv in the folder or beside the zip.'
    conditions: str = ""
    "Labels that the model is told: columns of the table, as column,... or name=column,..."
    text: str | None = None
    "Column of a text that the model is told, so that words can be a prompt; the loss is of the sound alone."
    test: str | None = None
    "Recordings left out: a rule column=value,value or a fraction; by default split=test if there is such a column."
    validation: str | None = None
    """Validation recordings: a rule such as index=5-9, or a fraction of what test leaves; by default split=validation
    if the table has such rows, else 0.1."""
    sample_rate: int = 8000
    "Hz; recordings at another rate are resampled."
    batch_tokens: int = 131072
    "Samples per batch, padding and text included."
    longest: int = 0
    """Longest context: longer recordings are cut into pieces of so many samples; 0 means as many as a batch has."""
    speed_change: int = 6
    "Percent by which half of the clips are slower or faster at most, pitch included; 0 means none."
    speeds: int = 4
    "Other speeds that there are, an even number, evenly spread; memory holds the clips once for each."
    flip: bool = False
    "Whether half of the clips change their sign."
    quieter: float = 0.0
    "Decibels by which a clip gets quieter at most, at random; as recorded, its peak is brought to 0.95."
    silence: float = 0.0
    "Seconds of silence before a clip at most, at random."
    noise: float | None = None
    """Decibels down to which the signal-to-noise ratio of half of the clips goes (from 30), in white noise or noise
    that slopes towards low frequencies; for classifiers, as a generating model would learn to make it."""
    mask: float = 0.0
    """Seconds at most of a stretch that half of the clips lose to silence, so that a classifier listens to all of a
    clip (SpecAugment's mask of time, on samples); 0 means none."""
    input_noise: float = 0.0
    """Levels of mu-law: how inexact the samples of a piece are as the model reads them, not as it is to tell them
    (highest standard deviation of a random measure). It then bears its own inexact samples, whose errors would grow in
    a long run (noise injection, Jin et al., 2018)."""
    label_dropout: float = 0.1
    """Probability with which each label is withheld, or the text, and again that of withholding all at once, so that
    the model can also do without (as --guidance needs)."""
    seed: int = 0
    "Seed of the split, the order, the variations and what is withheld."

    def __post_init__(self) -> None:
        for name, value, most in (("speed_change", self.speed_change, 50), ("label_dropout", self.label_dropout, 1)):
            if not 0 <= value <= most:
                raise InputError(f"{name} is {value}; expected 0 to {most}")
        if self.longest < 0:
            raise InputError(f"longest is {self.longest}; expected a number of samples, or 0")
        if self.speeds < 2 or self.speeds % 2:
            raise InputError(f"speeds is {self.speeds}; expected an even number: as many slower as faster ones")
        if self.noise is not None and not -60 <= self.noise <= 60:
            raise InputError(f"noise is {self.noise}; expected -60 to 60 decibels of signal to noise, such as 5")
        for name in ("quieter", "silence", "mask", "input_noise"):
            if not 0 <= (value := getattr(self, name)) <= 60:
                raise InputError(f"{name} is {value}; expected 0 to 60")


CLIPS = DataConfig()
GUIDANCE = 3.0
"""Of models that are told something and have learned to do without, unless a user says otherwise: as AudioGen and
MusicGen have it (Kreuk et al., 2022; Copet et al., 2023)."""
RECIPE = TrainingConfig(max_steps=4000, learning_rate=2e-3, ema_decay=0.999)


def train(
    data: Path,
    run: Path,
    *,
    classify: str | None = None,
    clips: DataConfig = CLIPS,
    training: TrainingConfig = RECIPE,
    start_from: str | None = None,
    widths: tuple[int, ...] | None = None,
    depths: tuple[int, ...] | None = None,
    pools: tuple[int, ...] | None = None,
    outer: Block | None = None,
    centre: Block | None = None,
    bidirectional: bool = False,
    d_state: int | None = None,
    head_dim: int | None = None,
    heads: int | None = None,
    window: int | None = None,
    mlp_expand: float | None = None,
    dropout: float = 0.1,
) -> None:
    """Train a model that generates sound like some recordings, or with --classify one that tells their label.

    The model is a causal U-Net over single samples (SaShiMi's shape), told labels (--clips.conditions), a text
    (--clips.text) or nothing. With one width it is a flat stack of blocks; a classifier's may then read both ways.
    run/model is the result.

    Args:
        data: A folder or zip of recordings, with a table of labels if there are any.
        run: Folder for checkpoints, logs and the model.
        classify: Column of the label that a classifier is to tell; without, the model generates.
        clips: Which recordings, which labels, and how batches are made.
        training: How to train.
        start_from: A model of sound (name or folder) whose layers and weights are taken over, to go on with other
            recordings or, with --classify, to tell labels by what it hears. Labels of the same name and value are known
            at once, others are learned anew. The options that follow, except dropout, are then its own.
        widths: Width of each stage of the U-Net, the finest first; by default [128,192,256].
        depths: Blocks of each stage: on the way down and again on the way up; the last stage is the centre. By default
            [4,4,6].
        pools: Steps of each stage that make one step of the next, by default [4,4]; [] for a flat stack.
        outer: Kind of block: mamba2 (default), mamba, s4d (S4D-Lin), s4d-inv, s4d-real, or attention.
        centre: Kind of block at the coarsest stage, if it is another.
        bidirectional: Whether the blocks of a flat classifier read both ways.
        d_state: State size of the blocks; by default 16 for mamba, else 64.
        head_dim: Head size of mamba2's blocks, by default 64; must divide twice every width.
        heads: Heads of attention, by default 4; must divide its widths into even sizes.
        window: Steps of its stage that attention sees; by default, and with 0, all.
        mlp_expand: Hidden width of a gated MLP after each block, in units of the width; by default none.
        dropout: Dropout while training.
    """
    start = None if start_from is None else read(resolve(start_from))[0]
    tokens = None if start is None else mu_law_of(start.tokenizer)
    backbone = choose_backbone(
        start, widths, depths, pools, outer=outer, centre=centre, d_state=d_state, head_dim=head_dim, heads=heads,
        window=window, mlp_expand=mlp_expand, dropout=dropout, bidirectional=bidirectional,
    )  # fmt: skip
    examples, conditions, mu_law = load_data(data, clips, classify, tokens)
    config = model_config(
        backbone, conditions, mu_law, classify=classify is not None, guidance=GUIDANCE if clips.label_dropout else 1.0
    )
    build(config)  # refuses sizes that do not fit before anything is written
    if first_process():
        counts = f"{len(examples.train)} clips to train on, {len(examples.validation)} to validate"
        labels = ", ".join(f"{c.name} ({len(c.values)})" for c in conditions) or "none"
        text = f"; text: {clips.text}, at most {mu_law.text} bytes" if mu_law.text else ""
        print(f"{counts}; labels: {labels}{text}; {examples.steps_per_epoch()} batches per epoch", file=sys.stderr)
    folder = fit(config, examples if classify is None else LabelData(examples), training, run, start_from=start_from)
    if first_process():
        print(folder)


def load_data(
    folder: Path, config: DataConfig, classify: str | None = None, start: MuLaw | None = None
) -> tuple[ClipData, tuple[ConditionConfig, ...], MuLaw]:
    """Training data, the conditions found in its table, and its tokens, from a folder or zip of recordings.

    With `classify` the one condition is the label to be told, which every clip has. With `start` tokens are those.
    """
    if start is not None and start.sample_rate != config.sample_rate:
        raise InputError(
            f"the model to start from hears {start.sample_rate} Hz, not {config.sample_rate}; give "
            f"--clips.sample-rate {start.sample_rate}"
        )
    recordings = open_recordings(folder, config.table)
    if classify is not None and (config.conditions or config.text):
        raise InputError("a classifier is told nothing; leave out --clips.conditions and --clips.text")
    conditions, ids = parse_conditions(recordings.rows, config.conditions if classify is None else classify)
    if classify is not None:
        if len(conditions) != 1 or len(conditions[0].values) < 2:
            raise InputError(f"--classify is {classify!r}; expected one column of at least two labels")
        known = np.flatnonzero(ids[:, 0] < len(conditions[0].values))
        recordings, ids = recordings.select(known), ids[known]
    rules = split_rules(recordings.rows, config.test, config.validation)
    parts = split_rows(recordings.rows, **rules, seed=config.seed)
    if len(parts["validation"]) == 0:
        raise InputError(f"validation {rules['validation']!r} leaves no recordings to validate on; take a larger part")
    texts = texts_of(recordings.rows, config.text)
    longest = max(len((text or "").strip().encode()) for text in texts)
    if config.text is not None and longest == 0:
        raise InputError(f"--clips.text is {config.text!r}, a column without any text; name another")
    text = -(-longest // TEXT_MULTIPLE) * TEXT_MULTIPLE
    mu_law = start or MuLaw(sample_rate=config.sample_rate, text=text)
    if mu_law.text and classify is not None:
        raise InputError("the model to start from reads text, which a classifier does not; start from another")
    if text > mu_law.text:
        raise InputError(
            f"column {config.text!r} has texts of {longest} bytes, and the model to start from reads {mu_law.text}; "
            "shorten them, or start from another"
        )
    half = config.speeds // 2
    tempo = {config.speed_change * n // half for n in range(1, half + 1)} - {0}
    speeds = {"train": sorted(100 + sign * percent for percent in tempo for sign in (-1, 1)), "validation": []}
    clips = {
        name: lay_out(
            recordings.select(parts[name]).read(config.sample_rate),
            mu_law,
            speeds=speeds[name],
            labels=ids[parts[name]],
            texts=[texts[row] for row in parts[name]],
        )
        for name in ("train", "validation")
    }
    data = ClipData(
        **clips,
        not_given=np.array([len(condition.values) for condition in conditions], dtype=np.int64),
        batch_tokens=config.batch_tokens,
        longest=config.longest,
        seed=config.seed,
        label_dropout=0.0 if classify else config.label_dropout,
        flip=config.flip,
        quieter=config.quieter,
        silence=round(config.silence * config.sample_rate),
        noise=config.noise,
        mask=round(config.mask * config.sample_rate),
        input_noise=config.input_noise,
    )
    return data, conditions, mu_law


def model_config(
    backbone: MultiscaleConfig | BackboneConfig,
    conditions: tuple[ConditionConfig, ...],
    mu_law: MuLaw,
    *,
    classify: bool = False,
    guidance: float = 1.0,
) -> ModelConfig:
    """The model of sound over a backbone, told the conditions, or a text; or a classifier of the first condition."""
    head = HeadConfig(task="sequence", labels=conditions[0].values) if classify else HeadConfig(task="next_token")
    return ModelConfig(
        vocab_size=mu_law.vocab_size,
        backbone=backbone,
        head=head,
        conditions=() if classify else conditions,
        guidance=guidance if not classify and (conditions or mu_law.text) else 1.0,
        tokenizer=mu_law.to_dict(),
    )
