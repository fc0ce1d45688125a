"""`longseq dna evaluate`: metrics with intervals, of a model on labelled data or of a table of predictions."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from seqmodels.config import Targets
from seqmodels.errors import InputError
from seqmodels.files import write_json
from seqmodels.metrics import as_tables, evaluate_any
from seqmodels.table import Row, TableWriter, check_same, check_writable, part_of
from seqmodels.tasks.genomics.datasets import parse_lengths, spaced_windows, taken
from seqmodels.tasks.genomics.evaluate_bases import evaluate_bases
from seqmodels.tasks.genomics.evaluate_bases import shown as bases_shown
from seqmodels.tasks.genomics.genome import Stretch
from seqmodels.tasks.genomics.inference import (
    BaseClassifier,
    Classifier,
    Dtype,
    Logits,
    label_of,
    labels_bases,
    scores_of,
)
from seqmodels.tasks.genomics.labelled import LabelledRecords, label_columns, label_ids, load_labelled, read_table
from seqmodels.tasks.genomics.manifest import Manifest
from seqmodels.tasks.genomics.pictures import PictureFormat, draw
from seqmodels.tasks.genomics.tokens import Tokens
from seqmodels.vectors import VectorWriter

_TABLES = (".tsv", ".tsv.gz", ".txt", ".csv", ".csv.gz", ".jsonl", ".parquet")
_SCORES = {"p_": "probability", "value_": "number"}
_PLACE: dict[str, type] = {"record_id": str, "start": int, "end": int, "window": int}


def evaluate(
    source: str,
    data: Path | None = None,
    labels: Path | None = None,
    annotation: list[Path] | None = None,
    features: str | None = None,
    within: Path | None = None,
    region: list[str] | None = None,
    split: str = "test",
    window: str | list[int] | None = None,
    windows: int = 200,
    overlap: bool = False,
    output: Path | None = None,
    predictions: Path | None = None,
    pictures: Path | None = None,
    picture_format: PictureFormat = "png",
    resamples: int = 1000,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    chunk: int | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> int:
    """Evaluate a model on labelled data, or a table of predictions that `longseq dna classify` has written.

    Prints accuracy, balanced accuracy, macro-F1, MCC, AUROC and AUPRC (one class against the rest, averaged), the Brier
    score, log loss and expected calibration error, each with its 95 % bootstrap interval over the samples; the same of
    each class against the rest; and the confusion matrix. Of a model of several labels the first table has means over
    the labels; of a model of numbers Pearson's and Spearman's correlation, R2 (the part of the variance that is
    explained), the root mean squared and the mean absolute error.

        longseq dna evaluate runs/mine/model --data gue/tf/0 --predictions test.tsv --pictures pictures
        longseq dna evaluate test.tsv                                    # again, from what was predicted
        longseq dna evaluate contigs.tsv --labels truth.csv              # or from what dna classify has written

    Of a model that labels bases, on genomes with their annotation: precision, recall, F1, MCC and AUROC of each class
    over bases, with intervals over blocks of 10,000 bases, and the confusion matrix in bases:

        longseq dna evaluate runs/coding/model --data genome.fa --annotation genes.gff3 --region chr3,chr4:1-2,000,000

    Args:
        source: A model (as for classify), or a table of predictions (.tsv, .csv, .jsonl, .parquet).
        data: For a model: labelled data of any kind that dna train reads.
        labels: Table with the columns record and label (or several label_<name>), for a FASTA file or for predictions.
        annotation: For a model that labels bases: GFF3, GTF or BED files, as for dna train; data is then FASTA.
        features: What makes the classes, as for dna train; needed where the model tells several features.
        within: BED, GFF3 or GTF file of where the annotation is complete, as for dna train.
        region: With --annotation, measure these records or parts of them alone, such as chr8 or chr9:1-5,000,000;
            several with commas between, or given several times.
        split: Which split to take where the data have splits: train, dev or test.
        window: Lengths of the windows cut from long records, for example 1024,8192,65536; otherwise whole records.
        windows: Windows per class and length, evenly spaced; the same number for each class.
        overlap: Whether windows may overlap to reach that number.
        output: JSON file for the results, with the intervals of each class, too.
        predictions: Table to write, a row per sample: record_id, start and end (from 0, end excluded), window, what is
            true, and what is predicted, as dna classify has it (.tsv, .csv, .jsonl, .parquet).
        pictures: Folder to draw into: ROC and precision-recall curves of each class, calibration, confusion matrix (of
            samples, or with --annotation of bases); of a model of numbers true against predicted ones. Each length of
            windows has its own folder in it.
        picture_format: png, svg or pdf.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
        device: auto, cpu, cuda or cuda:<number>.
        dtype: Number format of the weights and activations.
        batch_tokens: Bases per batch; otherwise 65,536 on a CPU, 1,048,576 on a GPU.
        chunk: Longer sequences are read in chunks of so many bases; otherwise 16,384 on a CPU, 1,048,576 on a GPU.
        resume: Go on where the same command was stopped or killed: what a model has said is in <output>.logits.part (or
            <predictions>.logits.part). Settings, files and weights must be the same. Not for labels of bases.
        quiet: No progress on a terminal.

    Returns:
        0.
    """
    for path in (output, predictions):
        if path is not None:
            check_writable(path)
    place = output or predictions
    if resume and (place is None or annotation is not None or source.endswith(_TABLES)):
        raise InputError(
            "only what a model says of whole sequences is kept, and beside a file: give --resume with a model, without "
            "--annotation, and with --output or --predictions"
        )
    if windows < 1 or resamples < 0:
        raise InputError(f"windows is {windows} and resamples is {resamples}; give at least 1 and 0")
    asked = {"source": source, "data": str(data) if data else None, "labels": str(labels) if labels else None}
    asked |= {"split": split, "windows": windows, "overlap": overlap, "resamples": resamples, "seed": seed}
    keeping: Any = nullcontext()
    if source.endswith(_TABLES):
        targets, classes, samples = _from_predictions(Path(source), labels)
    else:
        if data is None:
            raise InputError(f"{source} is taken for a model; name labelled data with --data")
        if labels_bases(source) or annotation is not None:
            if annotation is None:
                raise InputError(f"model {source} labels bases; name the --annotation of {data}")
            if predictions is not None:
                raise InputError("predictions are of whole sequences; see the tracks of dna classify for bases")
            base_classifier = BaseClassifier(source, device, dtype, batch_tokens, chunk)
            found = evaluate_bases(
                base_classifier, data, annotation, features, within=within, region=region or (),
                resamples=resamples, seed=seed, pictures=pictures, picture_format=picture_format, quiet=quiet,
            )  # fmt: skip
            print(bases_shown(found, base_classifier.classes), flush=True)
            if output is not None:
                report = {"source": source, "data": str(data), "annotation": [str(path) for path in annotation]}
                report |= {"features": features, "within": str(within) if within else None, "region": region or []}
                settings = {"resamples": resamples, "seed": seed, "classes": list(base_classifier.classes)}
                write_json(output, {**report, **settings, "results": [found]})
            return 0
        logits = None if place is None else place.with_name(f"{place.name}.logits")
        if resume and place and logits and place.exists() and not part_of(logits).exists():
            if output is not None:
                check_same(str(output), output, asked)
            print(f"{place} is there and whole: nothing to resume", file=sys.stderr)
            return 0
        lengths = parse_lengths(window)
        classifier = Classifier(source, device, dtype, batch_tokens, chunk)
        targets, classes = classifier.targets, classifier.classes
        records = load_labelled(data, labels, split=split, classes=classes, targets=targets)
        if lengths and not records.long:
            raise InputError(f"{data} has short records, which are taken whole; leave --window out")
        if logits is not None:
            settings = {"split": split, "windows": windows, "overlap": overlap, "window": lengths, "dtype": dtype}
            settings |= {"device": classifier.device.type, "batch_tokens": classifier.batch_tokens}
            inputs = [path for path in (data, labels) if path is not None]
            made = Manifest(logits, source, inputs, settings | {"chunk": classifier.chunk}).made
            keeping = _Logits(logits, _PLACE, len(classes), [*_PLACE] if resume else (), made)
        samples = _from_model(classifier, records, lengths, windows, overlap, quiet, keeping if logits else None)
    results = []
    writer: Any = nullcontext() if predictions is None else TableWriter(predictions, _columns(targets, classes))
    with keeping:
        with writer as table:
            for of in samples:
                results.append({"window": of.window, **evaluate_any(targets, *of.pair, resamples=resamples, seed=seed)})
                print(f"{_what(results[-1])}\n{as_tables(results[-1], classes)}", flush=True)
                if table is not None:
                    table.write(list(_rows(of, targets, classes)))
                if pictures is not None:
                    folder = pictures if of.window is None else pictures / f"window-{of.window}"
                    draw(folder, targets, classes, *of.pair, _what(results[-1]), picture_format)
        if output is not None:
            write_json(output, {**asked, "classes": list(classes), "results": results})
    return 0


class Samples(NamedTuple):
    """Records or windows, what is true of them, and what a model says."""

    window: int | None
    "Their length; None for whole records."
    names: list[str]
    "Their records."
    places: list[tuple[int | None, int | None]]
    "Where each begins and ends in its record (from 0, end excluded); None for the rows of a table."
    targets: NDArray
    "Labels (n, ...)."
    scores: NDArray[np.float64]
    "Probabilities, or numbers (n, classes)."

    @property
    def pair(self) -> tuple[NDArray, NDArray[np.float64]]:
        """Labels and scores."""
        return self.targets, self.scores


def measure(model: Path, records: LabelledRecords, lengths: list[int], device: str) -> list[dict[str, Any]]:
    """Metrics, without intervals, of a model on records or their windows (200 per class), for each length."""
    classifier = Classifier(str(model), device)
    samples = _from_model(classifier, records, lengths if records.long else [], 200, False, True)
    return [{"window": of.window, **evaluate_any(records.targets, *of.pair, resamples=0)} for of in samples]


def _from_model(
    classifier: Classifier, records: LabelledRecords, lengths: list[int], windows: int, overlap: bool, quiet: bool,
    kept: "_Logits | None" = None,
) -> Iterator[Samples]:  # fmt: skip
    """What the model says, for each length of windows; if it is kept somewhere, what is kept already."""
    whole = [Stretch(i, 0, len(tokens)) for i, tokens in enumerate(records.tokens)]
    for length in lengths or [None]:
        places = whole if length is None else spaced_windows(records, whole, length, windows, overlap=overlap)
        sequences, targets = taken(records, places)
        names = [records.names[place.record] for place in places]
        rows = [{"record_id": name, "start": place.start, "end": place.end, "window": length}
                for name, place in zip(names, places, strict=True)]  # fmt: skip
        scores = scores_of(_logits(classifier, sequences, rows, quiet, kept), classifier.targets)
        yield Samples(length, names, [(place.start, place.end) for place in places], targets, scores)


class _Logits(VectorWriter):
    """What a model has said of samples, until all is measured."""

    def _publish(self, rows: Path, path: Path) -> None:
        pass


def _logits(
    classifier: Classifier, sequences: list[Tokens], rows: list[Row], quiet: bool, kept: _Logits | None
) -> Logits:
    """Logits (n, classes) of samples with their rows: short sequences in batches, long ones in chunks."""
    logits = np.zeros((len(sequences), len(classifier.classes)), dtype=np.float32)
    limit = classifier.longest_batched
    short = [i for i, s in enumerate(sequences) if len(s) <= limit]
    blocks = [short[start : start + 1024] for start in range(0, len(short), 1024)]
    blocks += [[i] for i, s in enumerate(sequences) if len(s) > limit]

    def read(found: Logits) -> None:
        if len(own[0]) <= limit:
            found[:] = classifier.batch(own)
            return
        answer = classifier.stream(own[0:1])
        assert answer.logits is not None  # only a reading that is asked for can fail
        found[:] = answer.logits

    with tqdm(total=len(sequences), unit="sequence", disable=quiet or not sys.stderr.isatty()) as progress:
        for places in blocks:
            own = [sequences[i] for i in places]
            found = np.zeros((len(places), logits.shape[1]), dtype=np.float32)
            if kept is None:
                read(found)
            else:
                found = kept.add([rows[i] for i in places], len(places), read)
            logits[places] = found
            progress.update(len(places))
    return logits


def _from_predictions(path: Path, labels: Path | None) -> tuple[Targets, tuple[str, ...], Iterator[Samples]]:
    """What is predicted, the classes, and the samples: the rows that have a prediction."""
    table = _read_predictions(path)
    start = "value_" if any(name.startswith("value_") for name in table) else "p_"
    classes = tuple(name.removeprefix(start) for name in table if name.startswith(start))
    if "record_id" not in table and "name" in table:
        table["record_id"] = table["name"]  # of intervals and windows
    if not table.get("record_id") or not classes:
        raise InputError(f"{path} lacks the columns record_id and p_<class>; give a table written by 'dna classify'")
    skipped = [value in ("", None) for value in table[start + classes[0]]]
    if all(skipped):
        raise InputError(f"{path} has no row with a prediction; nothing can be evaluated")
    if any(skipped):
        print(f"longseq: {path}: {sum(skipped)} rows without a prediction are left out", file=sys.stderr)
        table = {name: list(compress(column, (not skip for skip in skipped))) for name, column in table.items()}
    names = [str(name) for name in table["record_id"]]
    own = {name: column for name, column in table.items() if name == "true" or name.startswith("true_")}
    truth = {
        name.replace("true", "label", 1): ["" if value is None else str(value) for value in column]
        for name, column in own.items()
    }
    told = truth if labels is None else read_table(labels)
    if not told:
        raise InputError(f"{path} is a table of predictions; name the table of labels with --labels")
    targets: Targets = "regression" if start == "value_" else "multi" if _several(told) else "single"
    if labels is not None:
        truth = label_columns(labels, names, path, targets)
    ids, _ = label_ids(truth, targets, classes, names, labels or path)
    exact = all(f"logit_{name}" in table for name in classes)  # near 1, probabilities of six digits tie
    try:
        scores = np.array([table[("logit_" if exact else start) + name] for name in classes], dtype=np.float64).T
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: a score is no number ({error})") from None
    scores = scores_of(scores, targets) if exact else scores
    if not np.isfinite(scores).all() or (start == "p_" and not ((scores >= 0) & (scores <= 1)).all()):
        raise InputError(f"{path}: a column {start}<class> has what is no {_SCORES[start]}; correct it")
    return targets, classes, iter([Samples(None, names, [(None, None)] * len(names), ids, scores)])


def _several(columns: dict[str, list[str]]) -> bool:
    """Whether these are labels of which a record may have any number."""
    return "label" not in columns or any(";" in text for text in columns["label"])


def _read_predictions(path: Path) -> dict[str, list[Any]]:
    if path.suffix not in (".jsonl", ".parquet"):
        return read_table(path)
    import polars

    try:
        frame = polars.read_parquet(path) if path.suffix == ".parquet" else polars.read_ndjson(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path") from None
    except (OSError, polars.exceptions.PolarsError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    return {name: frame[name].to_list() for name in frame.columns}


def _columns(targets: Targets, classes: tuple[str, ...]) -> dict[str, type]:
    """Of a table of predictions."""
    columns = dict(_PLACE)
    if targets == "single":
        columns |= {"true": str}
    else:
        columns |= {f"true_{name}": int if targets == "multi" else float for name in classes}
    if targets == "regression":
        return columns | {f"value_{name}": float for name in classes}
    return columns | {"label": str, "prob": float} | {f"p_{name}": float for name in classes}


def _rows(of: Samples, targets: Targets, classes: tuple[str, ...]) -> Iterator[Row]:
    """Of a table of predictions."""
    for name, (start, end), true, scores in zip(of.names, of.places, of.targets, of.scores, strict=True):
        row: Row = {"record_id": name, "start": start, "end": end, "window": of.window}
        if targets == "single":
            row |= {"true": classes[true]}
        else:
            kind = int if targets == "multi" else float
            row |= {f"true_{c}": None if np.isnan(v) else kind(v) for c, v in zip(classes, true, strict=True)}
        if targets == "regression":
            row |= {f"value_{c}": float(value) for c, value in zip(classes, scores, strict=True)}
        else:
            row |= {"label": label_of(scores, classes, targets), "prob": float(scores.max())}
            row |= {f"p_{c}": float(p) for c, p in zip(classes, scores, strict=True)}
        yield row


def _what(result: dict[str, Any]) -> str:
    what = "whole records" if result["window"] is None else f"windows of {result['window']} bases"
    return f"{result['n']} {what}"
