"""Several models of one recipe, by seed or by fold of a cross-validation, and the table of what they reach."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqmodels.checkpoint import read_json
from seqmodels.display import aligned
from seqmodels.errors import InputError
from seqmodels.files import write_json
from seqmodels.tasks.genomics.labelled import LabelledRecords
from seqmodels.tasks.genomics.tokens import reverse_complement
from seqmodels.training import TrainingConfig, first_process

MEASURED = "measured.json"  # in a model's run folder: what it reached, so that a resumed command measures nothing twice


@dataclass(frozen=True)
class Trial:
    """A model to be trained, and on what it will be measured: LabelledRecords, or LabelledBases (bases.py)."""

    run: Path
    "Its run folder."
    training: TrainingConfig
    "How it is trained; the seed is its own."
    records: Any
    "What it learns from."
    validation: Any
    "What its weights are chosen by; None: a part of the records."
    measured: dict[str, Any]
    "What it is measured on once it is finished, by name."
    fold: int | None = None
    "Which fold is held out."


def plan(
    run: Path,
    training: TrainingConfig,
    splits: Mapping[str, Any],
    seeds: int,
    folds: int,
) -> list[Trial]:
    """One trial per seed (that of `training` and those after it) and fold.

    Folds are of train and dev together; each is held out once, and the weights are chosen by a part of the others.
    """
    if seeds < 1 or folds < 0 or folds == 1:
        raise InputError(f"seeds is {seeds} and folds {folds}; give at least one seed, and no folds or two or more")
    one = seeds == 1 and not folds
    if not one and training.devices * training.num_nodes > 1:
        raise InputError("several models are trained one after the other, by one process; leave --training.devices out")
    records, dev, test = (splits.get(name) for name in ("train", "dev", "test"))
    assert records is not None
    parts: list[tuple[int | None, Any, Any, dict[str, Any]]] = []
    if folds:
        if records.long:
            raise InputError("folds are of short records; leave them out for a folder of genomes")
        whole = joined(records, dev) if dev is not None else records
        of = fold_of(whole, folds)
        for fold in range(folds):
            held_out = whole.take(np.flatnonzero(of == fold))
            parts.append((fold, whole.take(np.flatnonzero(of != fold)), None, {"fold": held_out}))
    else:
        parts.append((None, records, dev, {} if test is None else {"test": test}))
    trials = []
    for seed in range(training.seed, training.seed + seeds):
        for fold, own, chosen, measured in parts:
            name = f"seed{seed}" + ("" if fold is None else f"-fold{fold}")
            own_training = dataclasses.replace(training, seed=seed)
            trials.append(Trial(run if one else run / name, own_training, own, chosen, measured, fold))
    return trials


def joined(first: LabelledRecords, second: LabelledRecords) -> LabelledRecords:
    """The records of both."""
    return dataclasses.replace(
        first, names=first.names + second.names, tokens=first.tokens + second.tokens,
        labels=np.concatenate([first.labels, second.labels]),
    )  # fmt: skip


def fold_of(records: LabelledRecords, folds: int) -> NDArray[np.int64]:
    """The fold (records,) of each record: labels alike in all, and equal sequences (of either strand) together."""
    rng = np.random.default_rng(0)  # the same folds for every seed
    groups: dict[bytes, int] = {}
    group = np.array(
        [groups.setdefault(min(t.tobytes(), reverse_complement(t).tobytes()), len(groups)) for t in records.tokens]
    )
    if len(groups) < folds:
        raise InputError(f"there are {len(groups)} different sequences for {folds} folds; use fewer")
    firsts = np.unique(group, return_index=True)[1]  # a record of each group
    labels = np.nan_to_num(records.labels[firsts].reshape(len(firsts), -1))
    order = rng.permutation(len(firsts))
    order = order[np.lexsort(labels[order].T[::-1])]
    fold = np.empty(len(firsts), dtype=np.int64)
    fold[order] = np.arange(len(firsts)) % folds
    return fold[group]


Learn = Callable[[Trial], tuple[Path, Any]]
Measure = Callable[[Path, Any], list[dict[str, Any]]]


def run_trials(trials: list[Trial], learn: Learn, measure: Measure) -> list[dict[str, Any]]:
    """Trains and measures each; what was measured before is not measured again where the training is resumed.

    `learn` gives the model's folder and the records that were held out of its own, which it is measured on as "dev".
    """
    models = []
    for trial in trials:
        kept = trial.run / MEASURED
        model, held_out = learn(trial)  # of a finished model this only checks that it is resumed as it was started
        if trial.training.resume and kept.exists():
            before = read_json(kept)
            if trial.measured.keys() <= before.get("results", {}).keys():
                models.append(before)
                continue
        chosen = trial.validation or held_out
        measured = ({"dev": chosen} if chosen is not None else {}) | trial.measured
        found = {name: measure(model, records) for name, records in measured.items()}
        about = {"folder": trial.run.name, "seed": trial.training.seed, "fold": trial.fold}
        models.append({**about, "records": {name: len(r.names) for name, r in measured.items()}, "results": found})
        if first_process():
            write_json(kept, models[-1])
    return models


def summary(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each metric, on what it was measured: its mean over the models, their standard deviation, and the values."""
    rows = []
    for measured in models[0]["results"]:
        for k, first in enumerate(models[0]["results"][measured]):
            for metric in first["metrics"]:
                values = [model["results"][measured][k]["metrics"][metric]["value"] for model in models]
                known = [value for value in values if value is not None]
                rows.append({
                    "measured on": measured, "window": first["window"], "metric": metric,
                    "mean": float(np.mean(known)) if known else None,
                    "spread": float(np.std(known, ddof=1)) if len(known) > 1 else None,
                    "values": values,
                })  # fmt: skip
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    """The summary as text."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    cells = []
    for row in rows:
        cell = {"measured on": row["measured on"] + (f", {row['window']} bases" if row["window"] else "")}
        cell |= {"metric": row["metric"], "mean": number(row["mean"]), "spread": number(row["spread"])}
        cells.append(cell | {"each model": " ".join(map(number, row["values"]))})
    return aligned(cells, [*cells[0]]) if cells else ""
