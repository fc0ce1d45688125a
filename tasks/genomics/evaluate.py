"""`longseq dna evaluate`: metrics with intervals, of a model on labelled data or of a table of predictions."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from seqmodels.display import aligned
from seqmodels.errors import InputError
from seqmodels.files import write_json
from seqmodels.tasks.genomics.datasets import Stretch, parse_lengths, spaced_windows
from seqmodels.tasks.genomics.inference import Classifier, Dtype, Logits, probabilities, scores_of
from seqmodels.tasks.genomics.labelled import LabelledRecords, load_labelled, read_labels, read_table
from seqmodels.tasks.genomics.metrics import evaluate_any
from seqmodels.tasks.genomics.table import check_writable
from seqmodels.tasks.genomics.tokens import Tokens

_TABLES = (".tsv", ".tsv.gz", ".txt", ".csv", ".csv.gz", ".jsonl", ".parquet")


def evaluate(
    source: str,
    data: Path | None = None,
    labels: Path | None = None,
    split: str = "test",
    window: str | list[int] | None = None,
    windows: int = 200,
    overlap: bool = False,
    output: Path | None = None,
    resamples: int = 1000,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_tokens: int | None = None,
    chunk: int | None = None,
    quiet: bool = False,
) -> int:
    """Evaluate a model on labelled data, or a table of predictions that `longseq dna classify` has written.

    Prints accuracy, balanced accuracy, macro-F1, MCC, and AUROC and AUPRC (one class against the rest, averaged), each
    with its 95 % bootstrap interval over the samples, and the confusion matrix. Of a model of several labels: accuracy,
    F1, MCC, AUROC and AUPRC, averaged over the labels; of a model of numbers: Pearson's and Spearman's correlation, R2
    (the part of the variance that is explained) and the root mean squared error.

    Args:
        source: A model (as for classify), or a table of predictions (.tsv, .csv, .jsonl, .parquet).
        data: For a model: labelled data of any kind that dna train reads.
        labels: Table with the columns record and label, for a FASTA file or for predictions.
        split: Which split to take where the data have splits: train, dev or test.
        window: Lengths of the windows cut from long records, for example 1024,8192,65536; otherwise whole records.
        windows: Windows per class and length, evenly spaced; the same number for each class.
        overlap: Whether windows may overlap to reach that number.
        output: JSON file for the results.
        resamples: Bootstrap resamples.
        seed: Seed of the bootstrap.
        device: auto, cpu, cuda or cuda:<number>.
        dtype: Number format of the weights and activations.
        batch_tokens: Bases per batch; otherwise 65,536 on a CPU, 1,048,576 on a GPU.
        chunk: Longer sequences are read in chunks of so many bases; otherwise 16,384 on a CPU, 1,048,576 on a GPU.
        quiet: No progress on a terminal.

    Returns:
        0.
    """
    if output is not None:
        check_writable(output)
    if windows < 1 or resamples < 0:
        raise InputError(f"windows is {windows} and resamples is {resamples}; give at least 1 and 0")
    if source.endswith(_TABLES):
        if labels is None:
            raise InputError(f"{source} is a table of predictions; name the table of labels with --labels")
        targets = "single"
        classes, samples = _from_predictions(Path(source), labels)
    else:
        if data is None:
            raise InputError(f"{source} is taken for a model; name labelled data with --data")
        lengths = parse_lengths(window)
        classifier = Classifier(source, device, dtype, batch_tokens, chunk)
        targets = classifier.targets
        records = load_labelled(data, labels, split=split, classes=classifier.classes, targets=targets)
        if lengths and not records.long:
            raise InputError(f"{data} has short records, which are taken whole; leave --window out")
        classes = classifier.classes
        samples = _from_model(classifier, records, lengths, windows, overlap, quiet)
    results = []
    for length, true, scores in samples:
        results.append({"window": length, **evaluate_any(targets, true, scores, resamples=resamples, seed=seed)})
        print(_shown(results[-1], classes), flush=True)
    if output is not None:
        settings = {"split": split, "windows": windows, "overlap": overlap, "resamples": resamples, "seed": seed}
        report = {"source": source, "data": str(data) if data else None, "labels": str(labels) if labels else None}
        write_json(output, {**report, **settings, "classes": list(classes), "results": results})
    return 0


Samples = Iterator[tuple[int | None, NDArray, NDArray[np.float64]]]


def measure(model: Path, records: LabelledRecords, lengths: list[int], device: str) -> list[dict[str, Any]]:
    """Metrics, without intervals, of a model on records or their windows (200 per class), for each length."""
    classifier = Classifier(str(model), device)
    samples = _from_model(classifier, records, lengths if records.long else [], 200, False, True)
    return [{"window": n, **evaluate_any(records.targets, *pair, resamples=0)} for n, *pair in samples]


def _from_model(
    classifier: Classifier, records: LabelledRecords, lengths: list[int], windows: int, overlap: bool, quiet: bool
) -> Samples:
    """Window length (None: whole records), true labels (n, ...) and scores (n, classes), for each length."""
    stretches = [Stretch(i, 0, len(tokens)) for i, tokens in enumerate(records.tokens)]
    for length in lengths or [None]:
        sequences, targets = records.tokens, records.labels
        if length is not None:
            sequences, targets = spaced_windows(records, stretches, length, windows, overlap=overlap)
        yield length, targets, scores_of(_logits(classifier, sequences, quiet), classifier.targets)


def _logits(classifier: Classifier, sequences: list[Tokens], quiet: bool) -> Logits:
    """Logits (n, classes): short sequences in batches, long ones in chunks."""
    logits = np.zeros((len(sequences), len(classifier.classes)), dtype=np.float32)
    limit = classifier.longest_batched
    short = [i for i, s in enumerate(sequences) if len(s) <= limit]
    progress = tqdm(total=len(sequences), unit="sequence", disable=quiet or not sys.stderr.isatty())
    with progress:
        for start in range(0, len(short), 1024):
            places = short[start : start + 1024]
            logits[places] = classifier.batch([sequences[i] for i in places])
            progress.update(len(places))
        for i, sequence in enumerate(sequences):
            if len(sequence) > limit:
                answer = classifier.stream([sequence])
                assert answer.logits is not None  # only a reading that is asked for can fail
                logits[i] = answer.logits
                progress.update()
    return logits


def _from_predictions(path: Path, labels: Path) -> tuple[tuple[str, ...], Samples]:
    """Classes, and the samples of the rows that have a prediction."""
    label_of = read_labels(labels)
    table = _read_predictions(path)
    classes = tuple(name[2:] for name in table if name.startswith("p_"))
    table.setdefault("record_id", table.get("name", []))  # of intervals and windows
    if not table["record_id"] or not classes:
        raise InputError(f"{path} lacks the columns record_id and p_<class>; give a table written by 'dna classify'")
    ids = {name: i for i, name in enumerate(classes)}
    targets, rows = [], []
    for i, record in enumerate(table["record_id"]):
        if table[f"p_{classes[0]}"][i] in ("", None):
            continue
        if record not in label_of:
            raise InputError(f"{labels} has no label for record {record!r} of {path}; add it")
        if label_of[record] not in ids:
            raise InputError(f"{labels}: label {label_of[record]!r} is not a class of {path} ({', '.join(classes)})")
        targets.append(ids[label_of[record]])
        rows.append(i)
    if not rows:
        raise InputError(f"{path} has no row with a prediction; nothing can be evaluated")
    try:
        if all(f"logit_{name}" in table for name in classes):  # near 1, probabilities of six digits tie
            scores = probabilities(np.array([[float(table[f"logit_{name}"][i]) for name in classes] for i in rows]))
        else:
            scores = np.array([[float(table[f"p_{name}"][i]) for name in classes] for i in rows])
    except ValueError as error:
        raise InputError(f"{path}: a score is no number ({error})") from None
    if skipped := len(table["record_id"]) - len(rows):
        print(f"longseq: {path}: {skipped} rows without a prediction are left out", file=sys.stderr)
    return classes, iter([(None, np.array(targets, dtype=np.int64), scores)])


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


def _shown(result: dict[str, Any], classes: tuple[str, ...]) -> str:
    """A result as text: a line per metric, then the confusion matrix."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = []
    for name, values in result["metrics"].items():
        interval = f"{number(values['low'])} to {number(values['high'])}" if "low" in values else ""
        rows.append({"metric": name, "value": number(values["value"]), "95 % interval": interval})
    if "confusion" in result:
        counts = zip(classes, result["confusion"], strict=True)
        further = [
            {"true \\ predicted": name, **dict(zip(classes, counted, strict=True))} for name, counted in counts
        ]  # fmt: skip
    else:
        further = [{"label": name, **values} for name, values in zip(classes, result["labels"], strict=True)]
        further = [{k: v if k == "label" else number(v) for k, v in row.items()} for row in further]
    what = "whole records" if result["window"] is None else f"windows of {result['window']} bases"
    return "\n".join(
        [
            f"{result['n']} {what}",
            aligned(rows, ["metric", "value", "95 % interval"]),
            aligned(further, [*further[0]]),
        ]
    )
