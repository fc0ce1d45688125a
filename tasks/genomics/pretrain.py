"""`longseq dna pretrain`: a model that predicts bases, from genomes without labels."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

import seqmodels
from seqmodels.checkpoint import choose_device
from seqmodels.config import HeadConfig, ModelConfig
from seqmodels.errors import InputError
from seqmodels.files import replacing, write_json
from seqmodels.heads import IGNORED
from seqmodels.tasks.genomics.backbones import choose_backbone, kmer_config
from seqmodels.tasks.genomics.datasets import GenomeWindows
from seqmodels.tasks.genomics.genome import (
    Genome,
    Stretch,
    held_out,
    read_genome,
    stretches_of,
    whole_records,
    without,
)
from seqmodels.tasks.genomics.intervals import read_intervals
from seqmodels.tasks.genomics.markov import reference_bits
from seqmodels.tasks.genomics.tokens import (
    COMPLEMENT_MAP,
    MASK,
    SOFT_MASKED,
    TOKENIZER,
    VOCAB_SIZE,
    A,
    T,
)  # fmt: skip
from seqmodels.training import Batch, TrainingConfig, as_started, first_process, fit

Objective = Literal["next-token", "masked-token"]
_BASES = np.uint8(0x0F)
_COMPLEMENT = np.array([*COMPLEMENT_MAP, *(SOFT_MASKED | token for token in COMPLEMENT_MAP)], dtype=np.uint8)
_SPLITS = {"train": "train", "training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
_SPLITS |= {"validation": "validation", "test": "test"}


def pretrain(
    files: list[Path],
    run: Path,
    objective: Objective = "next-token",
    bed: Path | None = None,
    window: int = 4096,
    batch_tokens: int = 65536,
    length_warmup: int = 0,
    validation: str = "0.05",
    leave_out: str = "",
    validation_windows: int = 256,
    mask_fraction: float = 0.15,
    soft_mask_weight: float = 1.0,
    reverse_complement: bool = True,
    mixer: str | None = None,
    tie_projections: bool = False,
    strands: Literal["one", "equivariant"] | None = None,
    d_model: int | None = None,
    n_layer: int | None = None,
    d_state: int | None = None,
    kmer: int = 0,
    kmer_width: int = 16,
    dropout: float = 0.0,
    start_from: str | None = None,
    training: TrainingConfig = TrainingConfig(),  # noqa: B008  # frozen
) -> int:
    """Train a model to predict bases, from genomes alone, and write it to the folder RUN/model.

    What it has learned serves dna train (--start-from RUN/model), dna variants, dna embed and, with the objective
    next-token, dna generate. Windows are drawn at random from all of the genomes:

        longseq dna pretrain yeast.fa.gz runs/yeast --validation XIV --leave-out XV,XVI
        longseq dna pretrain hg38.fa runs/hg38 --bed human-sequences.bed --window 131072 --length-warmup 2000
            --soft-mask-weight 0.1

    Caduceus (equivariant: the one that reads both strands), and Caduceus-Ph without --strands:

        longseq dna pretrain genomes/*.fa.gz runs/caduceus --objective masked-token --mixer mamba --tie-projections
            --strands equivariant

    Beside the bits per base of the validation windows stands what counting gives: the best Markov chain of order 0 to
    11 (masked-token: the best table of the base between 0 to 5 bases on each side), counted in both strands of the
    training data. Two bits are pure chance. Bases that are N are never predicted. The figures are in RUN/results.json.

    Args:
        files: FASTA files of genomes, plain or compressed with gzip or BGZF; every record needs a name of its own.
        run: Folder for the logs, checkpoints, the genomes as tokens (a byte per base) and the model.
        objective: next-token: each base from those before it. masked-token: a part of the bases (--mask-fraction) from
            all others, on both sides; of these 80 % are hidden, 10 % are replaced by a random base and 10 % stay.
        bed: Read only these intervals of the genomes: a BED file, whose fourth column may say train, valid or test of
            each (test is not read). Shorter ones than the window are widened about their middle.
        window: Bases of a window.
        batch_tokens: Bases per batch.
        length_warmup: Steps over which windows grow from 1024 bases to their length, doubling.
        validation: What is held out to measure by: names of records, such as XIV or chr8,chr9, or parts of
            them, such as chr8:1-5,000,000; or a part of each record between 0 and 1, a stretch that no training window
            touches. Not with a BED file that says.
        leave_out: Names or parts of records that are not read at all, for example for tests to come.
        validation_windows: Windows that are validated, at most.
        mask_fraction: Part of the bases that masked-token predicts.
        soft_mask_weight: How much bases in lower case (repeats) count in the training loss: 1 as much as others, 0 not
            at all. In validation all count alike.
        reverse_complement: Whether each training window is read on the other strand half of the time.
        mixer: Kind of layer: mamba2 (the default), mamba, attention, lstm or cnn; or several with commas, which take
            turns, as cnn,mamba2. With masked-token, layers read both directions.
        tie_projections: With masked-token and mamba or mamba2: share the projections of both directions, as Caduceus.
        strands: equivariant, with masked-token: both strands are read, with the same weights (Caduceus-PS).
        d_model: Width; otherwise 128.
        n_layer: Layers; otherwise 4.
        d_state: State size of mamba and mamba2; otherwise 16 and 128.
        kmer: Also embed the last so many bases as one word, through a table of 4**kmer words; 0 means no such table.
        kmer_width: Width of that table.
        dropout: Dropout in the layers.
        start_from: A model (name or folder) whose weights are taken over where name and shape agree; its layers, too,
            unless one of the options from mixer to kmer_width (but for strands) says how to build new ones.
        training: Steps, learning rate, --seed, --device, --resume and so on; training. may be left out of their names.

    Returns:
        0.
    """
    training, masked = as_started(training), objective == "masked-token"
    if training.carry_state:
        raise InputError("carry_state is for endless streams, and windows are drawn at random here; leave it out")
    for name, value, least, most in (
        ("window", window, 2, batch_tokens),
        ("length_warmup", length_warmup, 0, None),
        ("validation_windows", validation_windows, 1, None),
        ("mask_fraction", mask_fraction, 1e-6, 1),
        ("soft_mask_weight", soft_mask_weight, 0, None),
    ):
        if value < least or (most is not None and value > most):
            span = f"at least {least}" if most is None else f"{least} to {most}"
            raise InputError(f"{name} is {value}; expected {span}")
    if strands == "equivariant" and not masked:
        raise InputError("strands equivariant reads both directions; give --objective masked-token with it")
    if masked and "attention" in (mixer or "").split(","):
        raise InputError("attention reads in one direction only, which serves next-token; name another --mixer")
    described = tie_projections or kmer or {mixer, d_model, n_layer, d_state} != {None}
    backbone = choose_backbone(
        start_from, mixer, d_model, n_layer, d_state, kmer=kmer_config(kmer, kmer_width), strands=strands,
        bidirectional=masked and (start_from is None or bool(described)), tie_projections=tie_projections,
    )  # fmt: skip
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        backbone=dataclasses.replace(backbone, dropout=dropout),
        head=HeadConfig(task="masked_token" if masked else "next_token"),
        tokenizer=TOKENIZER,
    )
    if seqmodels.build(config).causal and masked:  # and refuses what does not fit before anything is written
        raise InputError(f"{start_from} reads in one direction only, which serves next-token; describe other layers")
    if (run / "run.json").exists() and not training.resume:
        raise InputError(f"{run}: a run is already here; resume it with --training.resume or choose another folder")
    genome = read_genome(files, run)
    parts = divide(genome, bed, validation, leave_out, window, training.seed)
    per_step = training.batches_per_step
    if training.step_tokens:
        per_step = training.readers * max(1, round(training.step_tokens / (batch_tokens * training.readers)))
    data = GenomeData(
        genome,
        *parts,
        window,
        batch_tokens=batch_tokens,
        mask_fraction=mask_fraction if masked else None,
        soft_mask_weight=soft_mask_weight,
        augment=reverse_complement,
        validation_windows=validation_windows,
        length_warmup=length_warmup * per_step,
        seed=training.seed,
    )
    card, reference = "", ""
    if first_process():
        bases = sum(map(len, data.training))
        print(
            f"{len(genome.names)} records, {bases} bases to train on, {data.validated.size} to validate",
            file=sys.stderr,
        )
        k, counting = reference_bits(
            [genome.bases(s.record, s.start, s.end) for s in data.training], data.validated, masked=masked
        )
        sides = "on each side" if masked else "before it"
        reference = f"{counting:.4f} bits per base by counting, given {k} bases {sides}"
        print(f"for comparison on the validation windows: {reference}", file=sys.stderr, flush=True)
        card = _card(files, objective, window, bases, data.validated.size, reverse_complement, training, reference)
    model = fit(config, data, training, run, card=card, start_from=start_from)
    if first_process():
        bits = validation_bits(model, data, training.device)
        print(f"the model: {bits:.4f} bits per base; {reference}", file=sys.stderr)
        found = {"bits_per_base": bits, "counting_bits_per_base": counting, "counting_context": k}
        write_json(run / "results.json", found | {"bases_to_train_on": bases, "bases_to_validate": data.validated.size})
        with replacing(model / "README.md") as temporary:
            temporary.write_text(card.replace("BITS", f"{bits:.4f}"), encoding="utf-8")
        print(model)
    return 0


def divide(
    genome: Genome, bed: Path | None, validation: str, leave_out: str, window: int, seed: int
) -> tuple[list[Stretch], list[Stretch]]:
    """Stretches to train on and to validate on; none of the one touches one of the other, but where a BED file says.

    Stretches of a BED file are widened to a window where what they are part of leaves room.
    """
    left_out = stretches_of(genome, leave_out, "leave_out")
    whole = without(whole_records(genome), left_out)
    intervals = None if bed is None else read_bed(bed, genome)
    if intervals is not None and intervals.keys() != {""}:
        parts = dict.fromkeys(("train", "validation"), whole)
        chosen = {split: intervals.get(split, []) for split in parts}
        if not chosen["validation"]:
            raise InputError(f"{bed} has no interval whose fourth column says valid; add some, or drop the column")
    else:
        parts = _held_out(genome, whole, validation, seed)
        chosen = parts if intervals is None else dict.fromkeys(parts, intervals[""])
    if intervals is None:
        return parts["train"], parts["validation"]
    train, held = (_inside(chosen[split], parts[split], window) for split in ("train", "validation"))
    return train, held


def _held_out(genome: Genome, whole: list[Stretch], validation: str, seed: int) -> dict[str, list[Stretch]]:
    """Training and validation by records' names, or by a stretch of each record at a random place."""
    try:
        fraction = float(validation)
    except ValueError:
        named = stretches_of(genome, validation, "validation")
        train = without(whole, named)
        return {"train": train, "validation": without(whole, train)}
    if not 0 < fraction < 1:
        raise InputError(f"validation is {validation}; give a number between 0 and 1, or names of records")
    train, held = held_out(whole, fraction, seed)
    return {"train": train, "validation": held}


def _inside(intervals: list[Stretch], parts: list[Stretch], window: int) -> list[Stretch]:
    """What of the intervals lies in the parts, widened about its middle to a window where the part has room."""
    by_record: dict[int, list[Stretch]] = {}
    for part in parts:
        by_record.setdefault(part.record, []).append(part)
    result = []
    for interval in intervals:
        for part in by_record.get(interval.record, []):
            start, end = max(interval.start, part.start), min(interval.end, part.end)
            if start >= end:
                continue
            if end - start < window <= len(part):
                start = min(max(part.start, (start + end - window) // 2), part.end - window)
                end = start + window
            result.append(Stretch(interval.record, start, end))
    return result


def read_bed(path: Path, genome: Genome) -> dict[str, list[Stretch]]:
    """Intervals of a BED file by what their fourth column says: train, validation and test, or all as ''."""
    numbers = {name: i for i, name in enumerate(genome.names)}
    rows: list[tuple[str, Stretch]] = []
    for interval in read_intervals(path):
        if interval.seq not in numbers:
            raise InputError(f"{path}: the genomes have no record {interval.seq!r}; use the names of the FASTA file")
        record = numbers[interval.seq]
        if not interval.start < interval.end <= genome.length(record):
            raise InputError(
                f"{path}: {interval.start} to {interval.end} is no stretch of {interval.seq}, which has "
                f"{genome.length(record)} bases"
            )
        rows.append((_SPLITS.get(interval.name.lower(), ""), Stretch(record, interval.start, interval.end)))
    if not rows:
        raise InputError(f"{path} has no intervals; give a BED file with record, start and end in each line")
    said = all(split for split, _ in rows)  # other names are names of the intervals
    result: dict[str, list[Stretch]] = {}
    for split, stretch in rows:
        result.setdefault(split if said else "", []).append(stretch)
    return result


class GenomeData(GenomeWindows):
    """Batches of windows at random places; see training.TrainingData.

    With `mask_fraction` the targets are masked bases, otherwise each base's next.
    """

    def __init__(
        self,
        genome: Genome,
        training: list[Stretch],
        validation: list[Stretch],
        window: int,
        *,
        batch_tokens: int,
        mask_fraction: float | None = None,
        soft_mask_weight: float = 1.0,
        augment: bool = True,
        validation_windows: int = 256,
        length_warmup: int = 0,
        seed: int = 0,
    ) -> None:
        self.mask_fraction, self.soft_mask_weight, self.augment = mask_fraction, soft_mask_weight, augment
        super().__init__(
            genome, training, validation, window, batch_tokens=batch_tokens, validation_windows=validation_windows,
            length_warmup=length_warmup, seed=seed,
        )  # fmt: skip
        self.validated = np.stack([genome.bases(s.record, s.start, s.end) for s in self.validation])
        "Tokens (n, window) of the validation windows."

    def train_batch(self, step: int) -> Batch:
        """Batch number `step`: a pure function of the seed and the step."""
        length, count, rng = self._choose(step)
        drawn = [self._draw(length, rng) for _ in range(count)]
        coded = np.stack([self.genome.coded_bases(s.record, s.start, s.end) for s in drawn])
        if self.augment:
            other = rng.random(count) < 0.5
            coded[other] = _COMPLEMENT[coded[other, ::-1]]
        batch = self._batch(coded & _BASES, rng)
        if self.soft_mask_weight != 1:
            weights = np.where(coded & SOFT_MASKED, self.soft_mask_weight, 1).astype(np.float32)
            if self.mask_fraction is None:  # a target stands where the base before it is
                weights = np.roll(weights, -1, axis=1)
            batch["weights"] = torch.from_numpy(weights)
        return batch

    def validation_batches(self) -> list[Batch]:
        """The validation windows, always with the same masks."""
        size = max(1, self.batch_tokens // self.window)
        return [
            self._batch(self.validated[i : i + size], np.random.default_rng((self.seed, 3, i)))
            for i in range(0, len(self.validated), size)
        ]

    def _batch(self, tokens: NDArray[np.uint8], rng: np.random.Generator) -> Batch:
        """ids and targets (b, l) of windows (b, l)."""
        ids = tokens.astype(np.int64)
        bases = (ids >= A) & (ids <= T)
        if self.mask_fraction is None:
            targets = np.full_like(ids, IGNORED)
            targets[:, :-1] = np.where(bases, ids, IGNORED)[:, 1:]
        else:
            ids, targets = masked(ids, bases, self.mask_fraction, rng)
        return {"ids": torch.from_numpy(ids), "targets": torch.from_numpy(targets)}


def masked(
    ids: NDArray[np.int64], bases: NDArray[np.bool_], fraction: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """ids and targets (b, l) of the masked-token objective: `fraction` of the bases is to be predicted.

    Of these 80 % are [MASK], 10 % a random one of A, C, G and T, and 10 % as they were (Devlin et al., 2019).
    """
    chosen = bases & (rng.random(ids.shape) < fraction)
    way = rng.random(ids.shape)
    shown = np.where(chosen & (way < 0.8), MASK, ids)
    shown = np.where(chosen & (way >= 0.8) & (way < 0.9), rng.integers(A, T + 1, ids.shape), shown)
    return shown, np.where(chosen, ids, IGNORED)


@torch.inference_mode()
def validation_bits(folder: Path, data: GenomeData, device: str) -> float:
    """Bits per base of the model in a folder on the validation windows."""
    model, total, count = seqmodels.load(folder, device=choose_device(device)), 0.0, 0
    for batch in data.validation_batches():
        _, metrics = model.loss({name: tensor.to(model.device) for name, tensor in batch.items()})
        total, count = total + float(metrics["bits"]) * int(metrics["count"]), count + int(metrics["count"])
    return total / max(1, count)


def _card(
    files: list[Path], objective: str, window: int, bases: int, validated: int, augmented: bool,
    training: TrainingConfig, reference: str,
) -> str:  # fmt: skip
    """The model card; BITS stands for what is measured at the end."""
    names = ", ".join(f"`{file.name}`" for file in files[:10]) + (", ..." if len(files) > 10 else "")
    serves = "dna train (--start-from), dna variants, dna embed" + (", dna generate" * (objective == "next-token"))
    return f"""# Model of DNA, pretrained without labels

Predicts bases ({objective}). Trained on {names} ({bases} bases), windows of {window} bases,
{"both strands" if augmented else "one strand"}, {training.max_steps} steps, seed {training.seed}.

On {validated} bases held out: BITS bits per base. For comparison, {reference}.

Tokens: one per base (A 7, C 8, G 9, T 10, everything else that stands for a base 11, [MASK] 3).

Serves {serves}.
"""
