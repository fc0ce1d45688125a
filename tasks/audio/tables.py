"""Tables of recordings: files in a folder or zip, their labels, and the split into train, validation and test."""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from seqmodels.config import ConditionConfig
from seqmodels.errors import InputError
from seqmodels.tasks.audio.waveform import is_audio_name, read_audio, resample


@dataclass(frozen=True)
class Recordings:
    """Recordings of a folder or zip, with one table row each: the column `file` and any labels, all text."""

    source: Path
    rows: pl.DataFrame

    def select(self, numbers: np.ndarray) -> "Recordings":
        """The recordings of some rows."""
        return Recordings(self.source, self.rows[numbers])

    def read(self, sample_rate: int) -> list[np.ndarray]:
        """The waveform (l,) float32 of every row, mono, at `sample_rate` Hz."""
        names = self.rows["file"].to_list()
        if self.source.is_dir():
            return [resample(*read_audio(self.source / name), sample_rate) for name in names]
        with zipfile.ZipFile(self.source) as archive:
            members = set(archive.namelist())
            waves = []
            for name in names:
                if name not in members:
                    raise InputError(
                        f"{self.source}: holds no {name!r}, which the table names; correct its column file"
                    )
                data = io.BytesIO(archive.read(name))
                waves.append(resample(*read_audio(data, name=f"{self.source}:{name}"), sample_rate))
            return waves


def open_recordings(data: Path, table: Path | None = None) -> Recordings:
    """The recordings under `data`: a folder, a zip, or a folder that holds one zip.

    `table` is a CSV file whose column `file` names recordings inside `data`; None means metadata.csv in the folder or
    beside the zip if there is one, else every sound file and no labels.
    """
    if not data.exists():
        raise InputError(f"{data}: no such file or folder; give a folder or zip of recordings")
    folder = data if data.is_dir() else data.parent
    if table is None and (folder / "metadata.csv").is_file():
        table = folder / "metadata.csv"
    source, names = _list_source(data)
    if table is None:
        if not names:
            raise InputError(f"{data}: holds no recordings; expected .wav, .flac, .ogg or .mp3 files")
        return Recordings(source, pl.DataFrame({"file": names}))
    try:
        rows = pl.read_csv(table, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{table}: cannot be read as a CSV table ({str(error).splitlines()[0]})") from None
    if "file" not in rows.columns:
        raise InputError(f"{table}: has no column 'file'; its columns are {', '.join(rows.columns)}")
    if rows.height == 0:
        raise InputError(f"{table}: has no rows; expected one per recording")
    return Recordings(source, rows)


def _list_source(data: Path) -> tuple[Path, list[str]]:
    if data.is_dir():
        names = sorted(str(path.relative_to(data)) for path in data.rglob("*") if is_audio_name(path))
        archives = sorted(data.glob("*.zip"))
        if names or len(archives) != 1:
            return data, names
        data = archives[0]
    if not zipfile.is_zipfile(data):
        raise InputError(f"{data}: is neither a folder nor a zip of recordings")
    with zipfile.ZipFile(data) as archive:
        return data, sorted(name for name in archive.namelist() if is_audio_name(name))


def parse_conditions(rows: pl.DataFrame, text: str) -> tuple[tuple[ConditionConfig, ...], np.ndarray]:
    """Conditions of a model and each row's ids (rows, conditions), from "digit=word,speaker" (name=column or column).

    Values keep the order in which the table first names them; an empty cell means "not given".
    """
    conditions, ids = [], []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, column = part.partition("=")
        values = _column(rows, column or name, "--conditions").unique(maintain_order=True).drop_nulls().to_list()
        conditions.append(ConditionConfig(name=name, values=tuple(values)))
        ids.append(condition_ids(rows, conditions[-1], column or name))
    return tuple(conditions), np.stack(ids, axis=1) if ids else np.zeros((rows.height, 0), dtype=np.int64)


def match_conditions(rows: pl.DataFrame, conditions: tuple[ConditionConfig, ...], text: str = "") -> np.ndarray:
    """Each row's ids (rows, conditions) for the conditions of a trained model.

    A condition reads the column that `text` ("digit=word,...") names, else a column of its own name with known values,
    else the first column whose values it knows.
    """
    named = dict(part.split("=", 1) for part in text.replace(" ", "").split(",") if "=" in part)
    ids = []
    for condition in conditions:
        column = named.get(condition.name)
        if column is None:
            known = set(condition.values)
            candidates = sorted(rows.columns, key=lambda c, name=condition.name: c != name)
            found = (c for c in candidates if (seen := set(rows[c].drop_nulls())) and seen <= known)
            column = next(found, None)
        if column is None:
            raise InputError(
                f"no column of the table holds only values of the model's condition {condition.name!r} "
                f"({', '.join(condition.values[:8])}); name one with --conditions {condition.name}=COLUMN"
            )
        ids.append(condition_ids(rows, condition, column))
    return np.stack(ids, axis=1) if ids else np.zeros((rows.height, 0), dtype=np.int64)


def condition_ids(rows: pl.DataFrame, condition: ConditionConfig, column: str) -> np.ndarray:
    """Ids (rows,) int64 of one condition's values; an empty cell has the id after the last value."""
    ids = {value: i for i, value in enumerate(condition.values)} | {None: len(condition.values)}
    cells = _column(rows, column, "--conditions").to_list()
    if unknown := sorted({cell for cell in cells if cell not in ids}):
        raise InputError(
            f"column {column!r} holds {unknown[0]!r}, which is no value of the condition {condition.name!r}: "
            f"{', '.join(condition.values)}"
        )
    return np.array([ids[cell] for cell in cells], dtype=np.int64)


def split_rows(rows: pl.DataFrame, *, test: str, validation: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Row numbers of "train", "validation" and "test": disjoint, each in the table's order.

    A rule is "column=value,value..." (whole numbers also as ranges: "index=5-9"), or a fraction such as "0.1" drawn
    by `seed`, or "" for no rows. Validation rows are taken from what test leaves.
    """
    remaining = np.arange(rows.height)
    chosen = {}
    for number, (name, rule) in enumerate((("test", test), ("validation", validation))):
        mask = _rule_mask(rows[remaining], rule, np.random.default_rng((seed, number)), name)
        chosen[name], remaining = remaining[mask], remaining[~mask]
    if len(remaining) == 0:
        raise InputError(f"no rows are left to train on after test {test!r} and validation {validation!r}")
    return {"train": remaining, **chosen}


def test_rule(rows: pl.DataFrame, rule: str | None) -> str:
    """The given rule for test rows; None means "split=test" if there is a column split, else no rows."""
    return rule if rule is not None else "split=test" if "split" in rows.columns else ""


def _rule_mask(rows: pl.DataFrame, rule: str, rng: np.random.Generator, name: str) -> np.ndarray:
    mask = np.zeros(rows.height, dtype=bool)
    if not rule:
        return mask
    column, equals, values = rule.partition("=")
    if equals:
        mask |= _column(rows, column.strip(), f"--{name}").is_in(_expand(values)).fill_null(False).to_numpy()
        if not mask.any():
            raise InputError(f"--{name} {rule!r} selects no rows; look at the table's column {column!r}")
        return mask
    try:
        fraction = float(rule)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction < 1:
        raise InputError(f"--{name} is {rule!r}; expected a fraction below 1 or column=value,value...")
    mask[rng.permutation(rows.height)[: round(fraction * rows.height)]] = True
    return mask


def _expand(values: str) -> list[str]:
    expanded = []
    for value in (value.strip() for value in values.split(",")):
        first, dash, last = value.partition("-")
        whole = dash and first.isdigit() and last.isdigit()
        expanded += map(str, range(int(first), int(last) + 1)) if whole else [value]
    return expanded


def _column(rows: pl.DataFrame, column: str, flag: str) -> pl.Series:
    if column not in rows.columns:
        raise InputError(f"{flag} names the column {column!r}; the table has {', '.join(rows.columns)}")
    return rows[column]
