"""`longseq dna train`: a classifier of DNA sequences from labelled data."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from seqmodels.config import HeadConfig, ModelConfig
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.backbones import Mixer, Strands, choose_backbone
from seqmodels.tasks.genomics.datasets import RecordData, parse_lengths, training_data
from seqmodels.tasks.genomics.labelled import load_labelled
from seqmodels.tasks.genomics.tokens import TOKENIZER, VOCAB_SIZE
from seqmodels.training import TrainingConfig, as_started, first_process, fit


def train(
    data: Path,
    run: Path,
    labels: Path | None = None,
    window: str | list[int] | None = None,
    batch_tokens: int = 65536,
    batching: Literal["padded", "packed"] = "padded",
    length_warmup: int = 0,
    validation_fraction: float = 0.1,
    validation_windows: int = 40,
    reverse_complement: bool = True,
    mixer: Mixer | None = None,
    bidirectional: bool = False,
    tie_projections: bool = False,
    strands: Strands | None = None,
    d_model: int | None = None,
    n_layer: int | None = None,
    d_state: int | None = None,
    kmer: int = 0,
    kmer_width: int = 16,
    dropout: float = 0.0,
    pool: Literal["last", "mean", "sqrt", "max"] = "mean",
    supervise_every: int = 0,
    start_from: str | None = None,
    training: TrainingConfig = TrainingConfig(),  # noqa: B008  # frozen
) -> int:
    """Train a classifier of DNA sequences and write it to the folder RUN/model.

    The shipped model of enterobacteria was made in two runs: 8-mers alone, then with two Mamba-2 layers on top (its
    model card has every flag):

        longseq dna train genomes/enterobacteria runs/words --window 1024 --n-layer 0 --kmer 8 --pool sqrt
            --training.keep last
        longseq dna train genomes/enterobacteria runs/enterobacteria --window 1024,4096 --n-layer 2 --kmer 8
            --pool sqrt --start-from runs/words/model --training.keep last

    Caduceus-Ph, from the folder of a pretrained one (--strands equivariant for Caduceus-PS), or from nothing:

        longseq dna train promoters.csv runs/promoters --start-from caduceus-ph --strands conjoined
        longseq dna train promoters.csv runs/promoters --mixer mamba --bidirectional --tie-projections
            --strands conjoined

    Validation data are cut from the training data: a part of the records of each class, or of each long record a
    contiguous stretch that no training window touches.

    Args:
        data: A table with the columns sequence and label (.csv, .tsv, also .gz), a FASTA file (with --labels), or a
            folder of long records whose metadata.csv has the columns file, record and species or label.
        run: Folder for the logs, checkpoints and the model.
        labels: For a FASTA file: table with the columns record and label.
        window: Lengths in bases, for example 1024,8192,65536; each batch draws one. Long records: the windows'
            lengths, these three unless said otherwise; short records: longer ones are cut to it at a random place.
        batch_tokens: Bases per batch, padding included, whatever the length.
        batching: How short records share a batch. padded: those of similar length side by side, the shorter ones
            filled up; packed: any, end to end in a few long rows, with next to nothing filled up. Either way every
            record is read once per pass, and what lies beside it never changes what the model makes of it.
        length_warmup: Steps over which the windows of long records grow from 1024 bases to their length, doubling.
        validation_fraction: Part of the data that is held out.
        validation_windows: Windows per class and length that are validated, at most, in long records.
        reverse_complement: Whether each training sequence is read on the other strand half of the time.
        mixer: Kind of layer; otherwise mamba2.
        bidirectional: Whether layers read both directions; long records then need main memory for every base.
        tie_projections: With bidirectional mamba or mamba2: share the projections of both directions, as Caduceus.
        strands: Which strands the model reads. one: the sequence as given. conjoined: as given while training, and
            then both, whose logits are averaged (Caduceus-Ph). equivariant: both, always, so that strands never differ
            (Caduceus-PS). Both take twice the time; otherwise as in --start-from, or one.
        d_model: Width; otherwise 128.
        n_layer: Layers; otherwise 4.
        d_state: State size of mamba and mamba2; otherwise 16 and 128.
        kmer: Also embed the last so many bases as one word, through a table of 4**kmer words; 0 means no such table.
        kmer_width: Width of that table.
        dropout: Dropout, in the layers and before the classifier.
        pool: How the positions of a sequence are summarised: the last, mean or max, or sqrt for the sum divided by the
            square root of the length, under which evidence from long sequences adds up.
        supervise_every: With pool mean or sqrt: also learn from what was read after every so many bases, so that long
            windows teach every shorter length too; 0 means from the whole window only.
        start_from: A model (name or folder, also a pretrained Caduceus) whose weights are taken over where name and
            shape agree; the rest is new. Its layers are taken, too, unless one of the options from mixer to kmer_width
            (but for strands) says how to build new ones.
        training: Steps, learning rate and so on.

    Returns:
        0.
    """
    training, lengths = as_started(training), parse_lengths(window)
    if batch_tokens < max(lengths, default=1):
        raise InputError(f"batch_tokens is {batch_tokens}, less than one window of {max(lengths)}; raise it")
    per_step = training.batches_per_step
    if training.step_tokens:
        at_once = batch_tokens * training.readers
        if training.step_tokens < at_once:
            raise InputError(
                f"step_tokens is {training.step_tokens}, less than the {at_once} bases that are read at once; lower "
                "--batch-tokens, or raise --training.step-tokens"
            )
        per_step = training.readers * round(training.step_tokens / at_once)  # of windows, which fill their batches
    if batching == "packed" and supervise_every:
        raise InputError("supervise_every needs a row for each record; leave it out or give --batching padded")
    records = load_labelled(data, labels, split="train")
    served = training_data(
        records,
        lengths,
        batch_tokens=batch_tokens,
        validation_fraction=validation_fraction,
        validation_windows=validation_windows,
        augment=reverse_complement,
        seed=training.seed,
        length_warmup=length_warmup * per_step,
        packed=batching == "packed",
    )
    backbone = choose_backbone(
        start_from, mixer, d_model, n_layer, d_state, kmer, kmer_width, strands=strands,
        bidirectional=bidirectional, tie_projections=tie_projections,
    )  # fmt: skip
    config = ModelConfig(
        vocab_size=VOCAB_SIZE,
        backbone=dataclasses.replace(backbone, dropout=dropout),
        head=HeadConfig(
            task="sequence", labels=records.classes, pool=pool, dropout=dropout, supervise_every=supervise_every
        ),
        tokenizer=TOKENIZER,
    )
    what = (
        "whole records"
        if isinstance(served, RecordData) and not lengths
        else "windows of " + ", ".join(str(n) for n in served.lengths)
    )
    bases = sum(len(tokens) for tokens in records.tokens)
    if first_process():
        print(f"{len(records.names)} records, {bases} bases, {len(records.classes)} classes, {what}", file=sys.stderr)
    read_strands = None if backbone.strands is None else backbone.strands.training
    card = _card(data, records.classes, what, reverse_complement, read_strands, bases, training)
    model = fit(config, served, training, run, card=card, start_from=start_from)
    if first_process():
        print(model)
    return 0


def _card(
    data: Path, classes: tuple[str, ...], what: str, augmented: bool, both: bool | None, bases: int,
    training: TrainingConfig,
) -> str:  # fmt: skip
    """The model card: what a user of the weights has to know. `both`: StrandsConfig.training, or None."""
    names = "\n".join(f"{i}. {name}" for i, name in enumerate(classes))
    strands = "both strands (each sequence reverse-complemented half of the time)" if augmented else "one strand"
    answers = "" if both is None else "\n\nA sequence and its reverse complement get the same answer: "
    if both is not None:
        answers += "the model reads both." if both else "the mean of what the model says of the one and of the other."
    return f"""# Classifier of DNA sequences

Trained on `{data.name}` ({bases} bases), {what}, {strands}, {training.max_steps} steps, seed {training.seed}. The
weights with the best loss on held-out training data were kept.{answers}

Tokens: one per base (A 7, C 8, G 9, T 10, everything else that stands for a base 11, padding 4).

Classes, in order of their ids (from 0):

{names}

A sequence of another origin is also given one of these classes; the probabilities do not say that it is none of them.

    longseq dna classify contigs.fa.gz --model FOLDER
"""
