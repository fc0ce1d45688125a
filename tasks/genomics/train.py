"""`longseq dna train`: a classifier of DNA sequences from labelled data."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from seqmodels.config import HeadConfig, ModelConfig, Targets
from seqmodels.errors import InputError
from seqmodels.files import write_json
from seqmodels.tasks.genomics.backbones import Strands, choose_backbone, kmer_config
from seqmodels.tasks.genomics.bases import WINDOW, BaseData, LabelledBases, cut_validation, load_bases, split_bases
from seqmodels.tasks.genomics.datasets import Augmentation, RecordData, WindowData, parse_lengths, training_data
from seqmodels.tasks.genomics.kmers import fit_kmers
from seqmodels.tasks.genomics.labelled import LabelledRecords, load_labelled, splits_of
from seqmodels.tasks.genomics.tokens import TOKENIZER, VOCAB_SIZE
from seqmodels.tasks.genomics.trials import Trial, plan, run_trials, shown, summary
from seqmodels.training import TrainingConfig, TrainingData, Tune, as_started, first_process, fit


def train(
    data: Path,
    run: Path,
    labels: Path | None = None,
    targets: Targets = "single",
    annotation: list[Path] | None = None,
    features: str = "CDS",
    stranded: bool = False,
    within: Path | None = None,
    validation: str = "",
    leave_out: str = "",
    baseline: Literal["kmer", "cnn", "codons"] | None = None,
    window: str | list[int] | None = None,
    batch_tokens: int = 65536,
    batching: Literal["padded", "packed"] = "padded",
    epochs: float = 0,
    length_warmup: int = 0,
    validation_fraction: float = 0.1,
    validation_windows: int = 40,
    reverse_complement: bool = True,
    mutation_rate: float = 0.0,
    mixer: str | None = None,
    bidirectional: bool = False,
    tie_projections: bool = False,
    strands: Strands | None = None,
    d_model: int | None = None,
    n_layer: int | None = None,
    d_state: int | None = None,
    kmer: int = 0,
    kmer_width: int = 16,
    kmer_buckets: int | None = None,
    kmer_canonical: bool = False,
    dropout: float = 0.0,
    pool: Literal["last", "mean", "sqrt", "max"] = "mean",
    supervise_every: int = 0,
    class_weights: str | list[float] | None = None,
    start_from: str | None = None,
    tune: Tune = "full",
    seeds: int = 1,
    folds: int = 0,
    test: bool = False,
    training: TrainingConfig = TrainingConfig(),  # noqa: B008  # frozen
) -> int:
    """Train a classifier of DNA sequences and write it to the folder RUN/model.

    The shipped model of enterobacteria was made in two runs: words of 12 bases alone, then with two Mamba-2 layers on
    top (its model card has every flag):

        longseq dna train genomes/enterobacteria runs/words --window 256 --n-layer 0 --d-model 32 --kmer 12
            --kmer-width 5 --kmer-buckets 1048576 --kmer-canonical --mutation-rate 0.03 --pool sqrt
            --training.keep last
        longseq dna train genomes/enterobacteria runs/enterobacteria --window 256,1024,4096 --n-layer 2 --d-model 32
            --kmer 12 --kmer-width 5 --kmer-buckets 1048576 --kmer-canonical --mutation-rate 0.02 --pool sqrt
            --start-from runs/words/model --training.keep last

    Caduceus-Ph, from the folder of a pretrained one (--strands equivariant for Caduceus-PS), or from nothing:

        longseq dna train promoters.csv runs/promoters --start-from caduceus-ph --strands conjoined
        longseq dna train promoters.csv runs/promoters --mixer mamba --bidirectional --tie-projections
            --strands conjoined

    The recipe of Caduceus' table of the Genomic Benchmarks: batches of 256 sequences (here of 500 bases), a rate of
    1e-3 or 2e-3; each seed holds out its own tenth of the train split, and the weights with the best loss on it are
    tested:

        longseq dna train genomic-benchmarks/human_enhancers_cohn runs/cohn --start-from caduceus-ph
            --strands conjoined --batch-tokens 128000 --epochs 10 --seeds 5 --test --training.learning-rate 1e-3
            --training.betas [0.9,0.999] --training.warmup 0.01 --training.final-rate 0.1

    Data with official splits (see longseq dna data) are used as such: weights are learnt from train and chosen by dev.
    Without a dev split, validation data are cut from the training data: a part of the records of each class, or of each
    long record a contiguous stretch that no training window touches. The test split is not looked at unless --test asks
    for it, once per finished model.

    Five models, and their mean and spread on the test split in RUN/results.json; words as a baseline; a ten-fold
    cross-validation:

        longseq dna train gue/tf/0 runs/tf0 --seeds 5 --test
        longseq dna train gue/tf/0 runs/tf0-words --baseline kmer --test
        longseq dna train splice.data.gz runs/splice --folds 10

    A class for every base, from genomes and their annotation: what is coding, or exon, intron and the rest; the
    classes of both strands; codon usage as a baseline. What is left out is tested:

        longseq dna train genome.fa runs/coding --annotation genes.gff3 --validation chr2 --leave-out chr3,chr4 --test
            --bidirectional --strands equivariant
        longseq dna train genome.fa runs/genes --annotation genes.gtf --features CDS,exon,intron --stranded
        longseq dna train genome.fa runs/codons --annotation genes.gff3 --leave-out chr3 --test --baseline codons

    Args:
        data: A table with the columns sequence and label (.csv, .tsv, .parquet, also .gz); a FASTA file (with --labels,
            or headers that end in |label); a folder with train, dev and test of these, or with a folder of sequences
            per class (Genomic Benchmarks); or a folder of long records whose metadata.csv has the columns file, record
            and species or label. With --annotation: a FASTA file of genomes, or a folder of such.
        run: Folder for the logs, checkpoints and the model.
        labels: For a FASTA file: table with the columns record and label.
        targets: What a sequence is labelled with. single: one class. multi: any number of classes, ";" between them, or
            columns label_<name> with 0, 1 or nothing. regression: a number, or numbers in columns label_<name>.
        annotation: Learn the class of every base, from these GFF3 or GTF files (.gff, .gff3, .gtf, also .gz) or, with
            any other suffix, BED; may be given several times. Their sequences are the records of the FASTA.
        features: With --annotation, third column of the lines that make the classes, with commas between, such as
            CDS,exon,intron; what is none of them is the class background. Where several cover a base, the one named
            first counts. Introns are also made from what lies between a transcript's exons. All intervals of a BED file
            are of the one feature named here; of several, its fourth column says which.
        stranded: With --annotation, whether a feature is a class of its own on each strand (CDS+ and CDS-).
        within: With --annotation, a BED, GFF3 or GTF file of where annotation is complete: bases elsewhere are read,
            but have no class, as N and records that no line of the annotation mentions.
        validation: With --annotation, what is held out: records or parts of them, such as chr8,chr9:1-5,000,000;
            otherwise a stretch of each record (--validation-fraction).
        leave_out: With --annotation, records or parts of them that are the test split, written likewise.
        baseline: What a model has to beat, with the same data, table and commands. kmer: a linear model of how often
            each word of 3 to --kmer bases occurs (7 unless said otherwise), whose regularisation, and whether it reads
            both strands, are chosen by the validation data; none of the options of networks counts. cnn: a
            convolutional network of 6 layers, as --mixer cnn. codons, with --annotation: how much likelier codons, or
            pairs of them, are in the six frames around a base than elsewhere.
        window: Lengths in bases, for example 1024,8192,65536; each batch draws one. Long records: the windows'
            lengths, these three unless said otherwise; short records: longer ones are cut to it at a random place. With
            --annotation one length, 8192 unless said otherwise.
        batch_tokens: Bases per batch, padding included, whatever the length.
        batching: How short records share a batch. padded: those of similar length side by side, the shorter ones
            filled up; packed: any, end to end in a few long rows, with next to nothing filled up. Either way every
            record is read once per pass, and what lies beside it never changes what the model makes of it.
        epochs: Passes over short records to train for, validating after each, instead of --training.max-steps and
            --training.validate-every; 0 means as those say.
        length_warmup: Steps over which the windows of long records grow from 1024 bases to their length, doubling.
        validation_fraction: Part of the data that is held out.
        validation_windows: Windows per class and length that are validated, at most, in long records and genomes.
        reverse_complement: Whether each training sequence is read on the other strand half of the time.
        mutation_rate: Part of the bases of each training sequence that another base replaces, anew each time it is
            read, so that a model learns to recognise relatives of what it was shown.
        mixer: Kind of layer: mamba2 (the default), mamba, attention, lstm or cnn; or several with commas, which take
            turns, as cnn,mamba2.
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
        kmer_buckets: Rows of that table, if fewer: words (of up to 31 bases) are hashed to them.
        kmer_canonical: Whether a word and its reverse complement share their embedding.
        dropout: Dropout, in the layers and before the classifier.
        pool: How the positions of a sequence are summarised: the last, mean or max, or sqrt for the sum divided by the
            square root of the length, under which evidence from long sequences adds up.
        supervise_every: With pool mean or sqrt: also learn from what was read after every so many bases, so that long
            windows teach every shorter length too; 0 means from the whole window only.
        class_weights: Weight of each class in the loss, in order of the sorted names, for example 1,4; or balanced:
            in inverse proportion to how often it occurs. With targets multi, that of a class being there; with
            --annotation, of each base.
        start_from: A model (name or folder, also a pretrained Caduceus) whose weights are taken over where name and
            shape agree; the rest is new. Its layers are taken, too, unless one of the options from mixer to
            kmer_canonical (but for strands) says how to build new ones.
        tune: With --start-from: train all weights (full), or only the classifier on the frozen model (head).
        seeds: Models to train, with this many seeds in a row, each in a folder of its own in RUN.
        folds: Folds of a cross-validation over train and dev: each is held out once and measured. Labels are alike in
            all folds, and equal sequences, of either strand, are in the same one.
        test: Measure each finished model on the data's test split, too; otherwise only on the validation data (or, with
            --folds, on the fold that was held out). The figures are in RUN/results.json.
        training: Steps, learning rate, --seed, --device, --resume and so on; training. may be left out of their names.

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
    if baseline is not None and (mixer is not None or start_from is not None):
        raise InputError(f"--baseline {baseline} says what is trained; leave --mixer and --start-from out")
    if baseline == "cnn":
        mixer, n_layer = "cnn", 6 if n_layer is None else n_layer
    if bidirectional and mixer is not None and set(mixer.split(",")) == {"cnn"}:
        raise InputError("a CNN reads both directions as it is; leave --bidirectional out")
    if annotation is None:
        only = {"validation": validation, "leave_out": leave_out, "within": within, "stranded": stranded}
        _refuse(only, "is for", "add")
        if baseline == "codons":
            raise InputError("--baseline codons labels bases; name their --annotation")
        splits: Any = _splits(data, labels, targets, test, folds)
    else:
        other = {"labels": labels, "targets": targets != "single", "folds": folds, "epochs": epochs}
        other |= {"batching packed": batching == "packed", "supervise_every": supervise_every}
        _refuse(other | {"baseline kmer": baseline == "kmer"}, "does not go with", "leave out it or")
        if len(lengths) > 1:
            raise InputError(f"window is {window}; with --annotation all windows have one length")
        whole = load_bases(data, annotation, features, stranded=stranded, within=within)
        splits = split_bases(whole, validation, leave_out)
        if test and "test" not in splits:
            raise InputError("--test measures what --leave-out names; name some records or parts of them")
        splits = {name: split for name, split in splits.items() if test or name != "test"}
        for note in whole.labels.notes if first_process() else ():
            print(f"longseq: {note}", file=sys.stderr)
    trials = plan(run, training, splits, seeds, folds)

    def learn_words(trial: Trial) -> tuple[Path, LabelledRecords | None]:
        folder, both = _new_folder(trial), None if strands is None else strands != "one"
        card = f"# Linear model of words of DNA\n\nTrained on `{data.name}` by `longseq dna train --baseline kmer`.\n"
        held_out = fit_kmers(
            trial.records, trial.validation, folder, longest=kmer or 7, both_strands=both,
            class_weights=_record_weights(class_weights, trial.records), validation_fraction=validation_fraction,
            seed=trial.training.seed, card=card,
        )  # fmt: skip
        return folder, held_out

    def read_bases(trial: Trial) -> tuple[LabelledBases, LabelledBases]:
        """What to learn from, and to choose by."""
        if trial.validation is not None:
            return trial.records, trial.validation
        return cut_validation(trial.records, validation_fraction, trial.training.seed)

    def learn_codons(trial: Trial) -> tuple[Path, LabelledBases]:
        from seqmodels.tasks.genomics.codons import fit_codons

        records, held_out = read_bases(trial)
        card = f"# Codon usage\n\nFitted to `{data.name}` by `longseq dna train --baseline codons`.\n"
        return fit_codons(records, held_out, _new_folder(trial), card=card), held_out

    def learn_bases(trial: Trial) -> tuple[Path, LabelledBases]:
        records, held_out = read_bases(trial)
        head = HeadConfig(
            task="position", labels=records.classes, complement=records.labels.complement, dropout=dropout
        )
        counts = records.counts()
        weights = _class_weights(class_weights, records.classes, counts)
        served = BaseData(
            records, held_out, lengths[0] if lengths else min(WINDOW, batch_tokens), batch_tokens=batch_tokens,
            validation_windows=validation_windows * len(records.classes),
            augment=Augmentation(reverse_complement, mutation_rate),
            seed=trial.training.seed, length_warmup=length_warmup * per_step, class_weights=weights,
        )  # fmt: skip
        if first_process():
            of_classes = ", ".join(f"{n} {name}" for name, n in zip(records.classes, counts, strict=True))
            print(f"{records.bases} bases to train on ({of_classes}), windows of {served.window}", file=sys.stderr)
        return fitted(trial, head, served, f"windows of {served.window}", records.bases, trial.training), held_out

    def fitted(
        trial: Trial, head: HeadConfig, served: TrainingData, what: str, bases: int, training: TrainingConfig
    ) -> Path:  # fmt: skip
        backbone = choose_backbone(
            start_from, mixer, d_model, n_layer, d_state, strands=strands, bidirectional=bidirectional,
            tie_projections=tie_projections, kmer=kmer_config(kmer, kmer_width, kmer_buckets, kmer_canonical),
        )  # fmt: skip
        config = ModelConfig(
            vocab_size=VOCAB_SIZE,
            backbone=dataclasses.replace(backbone, dropout=dropout),
            head=head,
            tokenizer=TOKENIZER,
        )
        both = None if backbone.strands is None else backbone.strands.training
        card = _card(data, head, what, reverse_complement, both, bases, training)
        return fit(config, served, training, trial.run, card=card, start_from=start_from, tune=tune)

    def learn(trial: Trial) -> tuple[Path, Any]:
        if baseline == "kmer":
            return learn_words(trial)
        if annotation is not None:
            return learn_codons(trial) if baseline == "codons" else learn_bases(trial)
        records, training = trial.records, trial.training
        served = training_data(
            records,
            lengths,
            batch_tokens=batch_tokens,
            validation_fraction=validation_fraction,
            validation_windows=validation_windows,
            augment=Augmentation(reverse_complement, mutation_rate),
            seed=training.seed,
            length_warmup=length_warmup * per_step,
            packed=batching == "packed",
            validation=trial.validation,
        )
        if epochs:
            training = _by_epochs(training, epochs, served)
        head = HeadConfig(
            task="sequence", labels=records.classes, pool=pool, dropout=dropout, supervise_every=supervise_every,
            targets=targets, class_weights=_record_weights(class_weights, records), scale=_scale(records),
        )  # fmt: skip
        what = (
            "whole records"
            if isinstance(served, RecordData) and not lengths
            else "windows of " + ", ".join(str(n) for n in served.lengths)
        )
        bases = sum(len(tokens) for tokens in records.tokens)
        if first_process():
            kinds = f"{len(records.classes)} {'values' if targets == 'regression' else 'classes'}"
            print(f"{len(records.names)} records, {bases} bases, {kinds}, {what}", file=sys.stderr)
        model = fitted(trial, head, served, what, bases, training)
        return model, served.held_out if isinstance(served, RecordData) else None

    def measured(model: Path, records: LabelledRecords | LabelledBases) -> list[dict[str, Any]]:
        from seqmodels.tasks.genomics.evaluate import measure
        from seqmodels.tasks.genomics.evaluate_bases import measure_bases

        if not first_process():
            return []
        if isinstance(records, LabelledBases):
            return [measure_bases(model, records, training.device)]
        return measure(model, records, lengths, training.device)

    models = run_trials(trials, learn, measured)
    if first_process():
        if rows := summary(models):
            about = {"data": data.name, "targets": targets, "classes": list(splits["train"].classes), "seeds": seeds}
            write_json(run / "results.json", {**about, "folds": folds, "models": models, "summary": rows})
            print(shown(rows), file=sys.stderr)
        print(run / "model" if len(trials) == 1 else run / "results.json")
    return 0


def _splits(
    data: Path, labels: Path | None, targets: Targets, test: bool, folds: int
) -> dict[str, LabelledRecords]:  # fmt: skip
    """The splits that training and its measures read; the test split only if it is asked for."""
    there = splits_of(data, labels)
    if test and folds:
        raise InputError("folds measure each model on its held-out fold; leave --test out, or --folds")
    if test and "test" not in there:
        raise InputError(f"{data} has no test split to measure on; leave --test out, or use --folds")
    splits = {"train": load_labelled(data, labels, split="train", targets=targets)}
    for name in ("dev", *(("test",) if test else ())):
        if name in there:
            classes = splits["train"].classes
            splits[name] = load_labelled(data, labels, split=name, classes=classes, targets=targets)
    if targets != "single" and splits["train"].long:
        raise InputError("windows of long records have one class each; leave --targets out")
    return splits


def _by_epochs(training: TrainingConfig, epochs: float, served: RecordData | WindowData) -> TrainingConfig:
    """The same for so many passes over the data."""
    if not isinstance(served, RecordData) or training.step_tokens or epochs < 0:
        raise InputError(
            f"epochs is {epochs}; they count passes over short records, in steps of as many batches as --training."
            "accumulate says: give max-steps for windows of genomes and with --training.step-tokens"
        )
    per_pass = served.batches_per_pass / training.batches_per_step
    steps = max(1, round(epochs * per_pass))
    return dataclasses.replace(training, max_steps=steps, validate_every=min(steps, max(1, round(per_pass))))


def _refuse(options: dict[str, Any], why: str, remedy: str) -> None:
    """An InputError if any of the options is given, which go only with, or only without, --annotation."""
    for name, given in options.items():
        if given:
            raise InputError(f"--{name.replace('_', '-')} {why} labels of bases; {remedy} --annotation")


def _new_folder(trial: Trial) -> Path:
    """The folder of a baseline's model, which is written anew only by resuming."""
    folder = trial.run / "model"
    if folder.exists() and not trial.training.resume:
        raise InputError(f"{folder} is already here; choose another folder")
    return folder


def _record_weights(given: str | list[float] | None, records: LabelledRecords) -> tuple[float, ...]:
    """Weights of the classes of records for the loss."""
    if given is None:
        return ()
    if records.targets == "regression":
        raise InputError("class_weights are for classes; leave them out with --targets regression")
    if records.targets == "single":
        return _class_weights(given, records.classes, np.bincount(records.labels, minlength=len(records.classes)))
    there = np.nansum(records.labels, axis=0)
    if given == "balanced":
        return tuple(float(w) for w in ((~np.isnan(records.labels)).sum(0) - there) / np.maximum(there, 1))
    return _class_weights(given, records.classes, there)


def _class_weights(
    given: str | list[float] | None, classes: tuple[str, ...], counts: NDArray[Any]
) -> tuple[float, ...]:  # fmt: skip
    """Weights for the loss, of mean 1 over what has so many (classes,) of each class, if balanced."""
    if given is None:
        return ()
    if given == "balanced":
        return tuple(float(w) for w in counts.sum() / (len(classes) * np.maximum(counts, 1)))
    try:
        parts = given.strip("[]").split(",") if isinstance(given, str) else given
        weights = tuple(float(part) for part in parts)
    except ValueError:
        weights = ()
    if len(weights) != len(classes) or not all(0 < w < np.inf for w in weights):
        names = ", ".join(classes)
        raise InputError(f"class_weights is {given!r}; give balanced, or a positive number for each of {names}")
    return weights


def _scale(records: LabelledRecords) -> tuple[tuple[float, float], ...]:
    """Mean and standard deviation of each number to be predicted."""
    if records.targets != "regression":
        return ()
    columns = records.labels.astype(np.float64).T
    return tuple((float(np.nanmean(c)), float(np.nanstd(c)) or 1.0) for c in columns)


def _card(
    data: Path, head: HeadConfig, what: str, augmented: bool, both: bool | None, bases: int, training: TrainingConfig
) -> str:  # fmt: skip
    """The model card: what a user of the weights has to know. `both`: StrandsConfig.training, or None."""
    names = "\n".join(f"{i}. {name}" for i, name in enumerate(head.labels))
    other = (
        "A sequence of another origin is also given one of these classes; the probabilities do not say that it is none"
    )
    heading, said = {
        "single": ("Classes", f"{other} of them." if head.task == "sequence" else "Each base is given one of them."),
        "multi": ("Labels, each of which a sequence can have or not", "Each has a probability of its own."),
        "regression": ("Numbers that are predicted", "They are in the units of the training data."),
    }[head.targets]
    strands = "both strands (each sequence reverse-complemented half of the time)" if augmented else "one strand"
    answers = "" if both is None else "\n\nA sequence and its reverse complement get the same answer: "
    if both is not None:
        answers += "the model reads both." if both else "the mean of what the model says of the one and of the other."
    kept = {
        "best": "The weights with the best loss on held-out training data were kept.",
        "last": "The last weights were kept.",
        "both": "The folder model has the weights with the best loss on held-out training data, last the last ones.",
    }[training.keep]
    return f"""# Classifier of DNA {"sequences" if head.task == "sequence" else "bases"}

Trained on `{data.name}` ({bases} bases), {what}, {strands}, {training.max_steps} steps, seed {training.seed}.
{kept}{answers}

Tokens: one per base (A 7, C 8, G 9, T 10, everything else that stands for a base 11, padding 4).

{heading}, in order of their ids (from 0):

{names}

{said}

    longseq dna classify contigs.fa.gz --model FOLDER
"""
