"""`longseq audio classify`: a table with the label of each recording or window, from the raw samples."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from seqmodels.errors import InputError
from seqmodels.table import Format, Row, TableWriter

TOGETHER, LONG = 256, 1 << 24  # recordings or windows, and their samples, that are read before they are classified


def classify(
    files: list[Path],
    *,
    model: str | None = None,
    output: Path | None = None,
    format: Format | None = None,
    window: float | None = None,
    stride: float | None = None,
    batch_tokens: int = 65536,
    device: str = "auto",
) -> int:
    """Tell the label of recordings: a table with a row for each, or for each window, and the probability of each class.

    Without --window a recording is read whole, of any length if the model reads in one direction. A file that cannot be
    read has a row that says why (columns status and note); the others get theirs, and the exit code is 2.

    Args:
        files: Recordings (.wav, .flac, .ogg, .mp3), or folders, zips and tars of them.
        model: A classifier's folder (of audio train --classify), or a name on the Hugging Face hub.
        output: Table to write (.tsv, .csv, .jsonl, .parquet); by default it is shown.
        format: Format of the table, if the suffix does not say it: tsv, csv, jsonl or parquet.
        window: Seconds of the windows to classify instead of whole recordings.
        stride: Seconds from one window to the next; by default their length.
        batch_tokens: Samples that go through the model at a time.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
    """
    import seqmodels
    from seqmodels.checkpoint import choose_device

    for name, value in (("window", window), ("stride", stride)):
        if value is not None and not 0.01 <= value < float("inf"):
            raise InputError(f"{name} is {value}; expected seconds, 0.01 or more")
    if stride is not None and window is None:
        raise InputError(f"stride is {stride}, but there are no windows; give --window too")
    if model is None:
        raise InputError("no model is named; train one with audio train --classify COLUMN and give --model RUN/model")
    network = seqmodels.load(model, device=choose_device(device))
    classes = classes_of(network, model)
    columns: dict[str, type] = {"file": str, "start": float, "end": float, "label": str, "prob": float}
    columns |= {f"p_{name}": float for name in classes} | {"status": str, "note": str, "model": str}
    problems: list[str] = []
    with TableWriter(output, columns, format, ["file", "start", "end", "label", "prob", "status"]) as table:
        for rows in _rows(files, network, window, stride, batch_tokens, problems):
            table.write([row | {"model": model} for row in rows])
    for line in problems:
        print(f"longseq: {line}", file=sys.stderr)
    return 2 if problems else 0


def classes_of(network: Any, model: str) -> tuple[str, ...]:
    """The classes of a model of sound; an InputError if it is none that tells one label of a sequence."""
    from seqmodels.tasks.audio.waveform import mu_law_of

    mu_law_of(network.config.tokenizer)
    head = network.config.head
    if head.task != "sequence" or head.targets != "single":
        raise InputError(f"{model}: is no classifier of sound; train one with audio train --classify COLUMN")
    return head.labels


def _rows(
    files: Sequence[Path], network: Any, window: float | None, stride: float | None, batch_tokens: int,
    problems: list[str],
) -> Iterator[list[Row]]:  # fmt: skip
    """Rows in the order of the files; lines about files that cannot be read are added to `problems`."""
    from seqmodels.tasks.audio.waveform import SILENT, mu_law_of

    rate, rows, waves = mu_law_of(network.config.tokenizer).sample_rate, list[Row](), list[Any]()
    for name, wave in _recordings(files, rate):
        if isinstance(wave, InputError):
            problems.append(" ".join(str(wave).split()))
            rows.append({"file": name, "status": "error", "note": problems[-1]})
            continue
        for start, end in _windows(len(wave), window, stride, rate):
            waves.append(wave[start:end])
            silent = "silence" if abs(waves[-1]).max() < SILENT else None
            rows.append({"file": name, "start": start / rate, "end": end / rate, "status": "ok", "note": silent})
            if len(waves) >= TOGETHER or sum(map(len, waves)) >= LONG:
                yield _said(rows, waves, network, batch_tokens)
                rows, waves = [], []
    yield _said(rows, waves, network, batch_tokens)


def _recordings(files: Sequence[Path], rate: int) -> Iterator[tuple[str, Any]]:
    """Name and waveform (l,) at `rate` Hz of each recording, or the InputError that keeps it from being read."""
    from seqmodels.tasks.audio.tables import sound_files
    from seqmodels.tasks.audio.waveform import read_audio, resample

    for path in files:
        try:
            for name, source in sound_files(path):
                try:
                    wave, recorded = read_audio(source, name=name)
                    yield name, resample(wave, recorded, rate)
                except InputError as error:
                    yield name, error
        except InputError as error:  # a folder or archive
            yield str(path), error


def _said(rows: list[Row], waves: list[Any], network: Any, batch_tokens: int) -> list[Row]:
    """The rows with what the model says of the waves, which belong to those that are ok."""
    from seqmodels.tasks.audio.datasets import lay_out
    from seqmodels.tasks.audio.waveform import mu_law_of

    if not waves:
        return rows
    clips, classes = lay_out(waves, mu_law_of(network.config.tokenizer)), network.config.head.labels
    said = probabilities(network, clips, batch_tokens=batch_tokens)
    for row, p in zip((row for row in rows if row["status"] == "ok"), said, strict=True):
        row |= {"label": classes[p.argmax()], "prob": float(p.max())}
        row |= {f"p_{name}": float(value) for name, value in zip(classes, p, strict=True)}
    return rows


def _windows(length: int, window: float | None, stride: float | None, rate: int) -> Iterator[tuple[int, int]]:
    """Where windows begin and end, in samples; one that reaches the recording's end is the last, and may be shorter."""
    if window is None:
        yield 0, length
        return
    size, step = round(window * rate), round((stride or window) * rate)
    for start in range(0, length, step):
        yield start, min(start + size, length)
        if start + size >= length:
            return


def probabilities(
    model: Any, clips: Any, *, batch_tokens: int = 65536, progress: Callable[[int], Any] = lambda n: None
) -> Any:
    """Probabilities (clips, classes) float64, of every clip as recorded (datasets.Clips), on the device of the model.

    A clip longer than `batch_tokens` goes through in chunks if the model reads in one direction.
    """
    import numpy as np
    import torch

    from seqmodels.heads import IGNORED
    from seqmodels.tasks.audio.datasets import batches

    found = np.zeros((len(clips), len(model.config.head.labels)))
    with torch.inference_mode():
        for batch in batches(clips, batch_tokens, longest=None):
            ids, lengths = batch["ids"].to(model.device), (batch["targets"] != IGNORED).sum(1).to(model.device)
            if len(ids) == 1 and ids.shape[1] > batch_tokens and model.causal:
                state = None
                for part in ids[:, : int(lengths[0])].split(batch_tokens, 1):
                    state = model.read(part, state)
                logits = model.classify(state)
            else:
                logits = _whole(model, ids, lengths)
            found[batch["clips"].numpy()] = logits.double().softmax(-1).cpu().numpy()
            progress(len(ids))
    return found


def _whole(model: Any, ids: Any, lengths: Any) -> Any:
    """Logits of padded rows in one pass."""
    import torch

    try:
        return model(ids, lengths=lengths)
    except torch.OutOfMemoryError:
        rows, length = ids.shape
        raise InputError(
            f"{rows} x {length} samples do not fit into the GPU's memory; give a smaller --batch-tokens"
            + ("" if model.causal else ", or --window: this model reads both ways")
        ) from None


def evaluate_classifier(
    model: Any, recordings: Any, column: str, *, batch_tokens: int, progress: Callable[[int], Any]
) -> dict[str, Any]:
    """Metrics with intervals, of each class too, and the confusion matrix, on recordings (tables.Recordings).

    `column` holds the labels ("" looks for one that holds the classes); recordings without a label do not count.
    """
    import numpy as np

    from seqmodels.config import ConditionConfig
    from seqmodels.metrics import evaluate_scores
    from seqmodels.tasks.audio.datasets import lay_out
    from seqmodels.tasks.audio.tables import match_conditions
    from seqmodels.tasks.audio.waveform import mu_law_of

    classes, mu_law = model.config.head.labels, mu_law_of(model.config.tokenizer)
    label = ConditionConfig(name="label", values=classes)
    ids = match_conditions(recordings.rows, (label,), f"label={column}" if column else "")[:, 0]
    known = np.flatnonzero(ids < len(classes))
    if len(known) == 0:
        raise InputError("no recording has a label to compare with; name its column with --conditions COLUMN")
    clips = lay_out(recordings.select(known).read(mu_law.sample_rate), mu_law)
    scores = probabilities(model, clips, batch_tokens=batch_tokens, progress=progress)
    return {"n": len(known), "classes": list(classes), **evaluate_scores(ids[known], scores)}
