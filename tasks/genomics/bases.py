"""Labelled bases: genomes with the class of every base, and batches of windows of them for training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from seqmodels.errors import InputError
from seqmodels.heads import IGNORED
from seqmodels.tasks.genomics.annotation import BaseLabels, label_bases
from seqmodels.tasks.genomics.datasets import Augmentation, Batch, GenomeWindows
from seqmodels.tasks.genomics.genome import (
    Genome,
    Stretch,
    held_out,
    read_genome,
    stretches_of,
    whole_records,
    without,
)
from seqmodels.tasks.genomics.tokens import N, Tokens, reverse_complement

WINDOW = 8192
"Bases of a training window unless said otherwise."
_SUFFIXES = (".fa", ".fna", ".fasta")


@dataclass(frozen=True)
class LabelledBases:
    """Stretches of genomes with the class of each base."""

    genome: Genome
    labels: BaseLabels
    stretches: list[Stretch]

    targets: Literal["single"] = "single"
    long: Literal[True] = True

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in order of their ids."""
        return self.labels.classes

    @property
    def names(self) -> list[str]:
        """The stretches as samtools writes regions."""
        return [f"{self.genome.names[s.record]}:{s.start + 1}-{s.end}" for s in self.stretches]

    @property
    def bases(self) -> int:
        """Bases of all stretches."""
        return sum(map(len, self.stretches))

    def of(self, stretch: Stretch) -> tuple[Tokens, NDArray[np.int64]]:
        """Tokens (l,) of a stretch and the classes (l,) of its bases, IGNORED where unknown, as at every N."""
        tokens = self.genome.bases(stretch.record, stretch.start, stretch.end)
        labels = self.labels.of(self.genome.names[stretch.record], stretch.start, stretch.end)
        labels[tokens == N] = IGNORED
        return tokens, labels

    def blocks(self, size: int = 1 << 20) -> Iterator[tuple[Tokens, NDArray[np.int64]]]:
        """Tokens and classes of all stretches, at most `size` bases at a time."""
        for s in self.stretches:
            for start in range(s.start, s.end, size):
                yield self.of(replace(s, start=start, end=min(start + size, s.end)))

    def counts(self) -> NDArray[np.int64]:
        """Bases (classes,) of each class."""
        total = np.zeros(len(self.classes), dtype=np.int64)
        for _, labels in self.blocks():
            total += np.bincount(labels[labels != IGNORED], minlength=len(total))
        return total

    def taking(self, stretches: list[Stretch]) -> "LabelledBases":
        """The same of other stretches."""
        return replace(self, stretches=stretches)


def load_bases(
    data: Path,
    annotation: Sequence[Path],
    features: str,
    *,
    stranded: bool = False,
    within: Path | None = None,
    region: str = "",
) -> LabelledBases:
    """The records, or the regions of them, of a FASTA file or a folder of such, with labels from annotation."""
    files = [data]
    if data.is_dir():
        files = sorted(p for p in data.iterdir() if Path(p.name.removesuffix(".gz")).suffix in _SUFFIXES)
        if not files:
            raise InputError(f"{data} has no FASTA file ({', '.join(_SUFFIXES)}, also .gz); give a file or a folder")
    genome = read_genome(files)
    lengths = {name: genome.length(i) for i, name in enumerate(genome.names)}
    named = [feature.strip() for feature in features.split(",")]
    labels = label_bases(annotation, named, lengths, stranded=stranded, within=within)
    return LabelledBases(genome, labels, stretches_of(genome, region, "region") or whole_records(genome))


def split_bases(whole: LabelledBases, validation: str, leave_out: str) -> dict[str, LabelledBases]:
    """Splits train, dev and test: what is left, and the stretches that two options name, none where they name none."""
    test = stretches_of(whole.genome, leave_out, "leave_out")
    left = without(whole.stretches, test)
    train = without(left, stretches_of(whole.genome, validation, "validation"))
    parts = {"train": train, "dev": without(left, train), "test": without(whole.stretches, left)}
    splits = {name: whole.taking(part) for name, part in parts.items() if part or name == "train"}
    for name, split in splits.items():
        missing = [label for label, bases in zip(whole.classes, split.counts(), strict=True) if not bases]
        if name == "train" and missing:
            raise InputError(
                f"no base to train on is {missing[0]}; where features overlap, the one named first in --features "
                "counts (name the one that lies in the other first, such as CDS,exon,gene), or hold out less"
            )
        if len(missing) == len(whole.classes):
            raise InputError(f"no base of the {name} split has a label; hold out other stretches")
    return splits


def cut_validation(records: LabelledBases, fraction: float, seed: int) -> tuple[LabelledBases, LabelledBases]:
    """What to train on, and of each stretch a part that is held out, at a place that the seed decides."""
    if not 0 < fraction < 1:
        raise InputError(f"validation_fraction is {fraction}; give a number between 0 and 1")
    train, held = held_out(records.stretches, fraction, seed)
    return records.taking(train), records.taking(held)


class BaseData(GenomeWindows):
    """Batches of windows of labelled bases, at random places and on either strand; see training.TrainingData.

    `class_weights` (classes,) is how much a base of each class counts in the training loss; nothing means 1.
    """

    useless = "have no base with a label"

    def __init__(
        self,
        records: LabelledBases,
        validation: LabelledBases,
        window: int,
        *,
        batch_tokens: int,
        validation_windows: int,
        augment: Augmentation,
        seed: int,
        length_warmup: int = 0,
        class_weights: Sequence[float] = (),
    ) -> None:
        self.records, self.augment = records, augment
        self.class_weights = np.array(class_weights, dtype=np.float32)
        super().__init__(
            records.genome, records.stretches, validation.stretches, window, batch_tokens=batch_tokens,
            validation_windows=validation_windows, length_warmup=length_warmup, seed=seed,
        )  # fmt: skip

    def teaches(self, stretch: Stretch) -> bool:
        """Whether a base of a window has a label."""
        return bool((self.records.of(stretch)[1] != IGNORED).any())

    def train_batch(self, step: int) -> Batch:
        """Batch number `step`: a pure function of the seed and the step."""
        length, count, rng = self._choose(step)
        drawn = [self._draw(length, rng) for _ in range(count)]
        other = rng.random(count) < 0.5 * self.augment.reverse_complement
        batch = self._batch(drawn, other)
        if self.augment.mutation_rate:
            mutate = replace(self.augment, reverse_complement=False)
            batch["ids"] = torch.from_numpy(np.stack(mutate(list(batch["ids"].numpy()), rng)))
        if len(self.class_weights):
            batch["weights"] = torch.from_numpy(self.class_weights[batch["targets"].numpy().clip(min=0)])
        return batch

    def validation_batches(self) -> list[Batch]:
        """The validation windows as they stand."""
        size = max(1, self.batch_tokens // self.window)
        parts = [self.validation[i : i + size] for i in range(0, len(self.validation), size)]
        return [self._batch(part, np.zeros(len(part), dtype=bool)) for part in parts]

    def _batch(self, stretches: list[Stretch], other: NDArray[np.bool_]) -> Batch:
        """ids and targets (b, l) of stretches of one length, some read on the other strand."""
        ids, targets = (np.stack(parts) for parts in zip(*map(self.records.of, stretches), strict=True))
        ids[other], targets[other] = reverse_complement(ids[other]), self.records.labels.turned(targets[other])
        return {"ids": torch.from_numpy(ids.astype(np.int64)), "targets": torch.from_numpy(targets)}
