"""Tables of recordings: files in a folder, zip or tar, their labels, and the split into train, validation and test."""

import io
import tarfile
import zipfile
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from seqmodels.config import ConditionConfig
from seqmodels.errors import InputError
from seqmodels.tasks.audio.layouts import known_layout
from seqmodels.tasks.audio.waveform import is_audio_name, read_audio, resample

_BROKEN = (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error)


@dataclass(frozen=True)
class Recordings:
    """Recordings of a folder, zip or tar, with one table row each: the column `file` and any labels, all text."""

    source: Path
    rows: pl.DataFrame

    def select(self, numbers: np.ndarray) -> "Recordings":
        """The recordings of some rows."""
        return Recordings(self.source, self.rows[numbers])

    def read(self, sample_rate: int) -> list[np.ndarray]:
        """The waveform (l,) float32 of every row, mono, at `sample_rate` Hz."""
        waves = {name: resample(wave, rate, sample_rate) for name, wave, rate in self.as_recorded()}
        return [waves[name] for name in self.rows["file"]]

    def as_recorded(self) -> Iterator[tuple[str, np.ndarray, int]]:
        """Each file's name, waveform (l,) float32, mono, and rate in Hz; in the order in which they are stored."""
        wanted = set(self.rows["file"])
        if self.source.is_dir():
            for name in self.rows["file"].unique(maintain_order=True):
                yield name, *read_audio(self.source / name)
            return
        missing = set(wanted)
        for name, content in _members(self.source, wanted):
            missing.discard(name)
            yield name, *read_audio(io.BytesIO(content), name=f"{self.source}:{name}")
        if missing:
            name = min(missing)
            raise InputError(f"{self.source}: holds no {name!r}, which the table names; correct its column file")


def open_recordings(data: Path, table: Path | None = None) -> Recordings:
    """The recordings under `data`: a folder, a zip, a tar (also .tar.gz), or a folder that holds one zip or tar.

    `table` is a CSV file whose column `file` names recordings inside `data`; None means metadata.csv in the folder or
    beside the archive if there is one, else what the official file names of a public set say (layouts.py), else every
    sound file and no labels.
    """
    if not data.exists():
        raise InputError(f"{data}: no such file or folder; give a folder, zip or tar of recordings")
    folder = data if data.is_dir() else data.parent
    if table is None and (folder / "metadata.csv").is_file():
        table = folder / "metadata.csv"
    source, names = _list_source(data)
    if table is None:
        rows = known_layout(source, names, lambda name: _content(source, name))
        if rows is None:
            rows = pl.DataFrame({"file": sorted(filter(is_audio_name, names))})
        if rows.height == 0:
            raise InputError(f"{data}: holds no recordings; expected .wav, .flac, .ogg or .mp3 files")
        return Recordings(source, rows)
    try:
        rows = pl.read_csv(table, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{table}: cannot be read as a CSV table ({str(error).splitlines()[0]})") from None
    if "file" not in rows.columns:
        raise InputError(f"{table}: has no column 'file'; its columns are {', '.join(rows.columns)}")
    if rows.height == 0:
        raise InputError(f"{table}: has no rows; expected one per recording")
    return Recordings(source, rows)


def sound_files(data: Path) -> Iterator[tuple[str, Path | io.BytesIO]]:
    """Name and content of a recording, or of each in a folder, zip or tar, whose name comes first."""
    if data.is_file() and is_audio_name(data):
        yield str(data), data
        return
    if not data.exists():
        raise InputError(f"{data}: no such file or folder; give a recording, or a folder, zip or tar of them")
    source, names = _list_source(data)
    wanted = sorted(filter(is_audio_name, names))
    if not wanted:
        raise InputError(f"{data}: holds no recordings; expected .wav, .flac, .ogg or .mp3 files")
    if source.is_dir():
        yield from ((str(source / name), source / name) for name in wanted)
    else:
        yield from ((f"{source}:{name}", io.BytesIO(content)) for name, content in _members(source, set(wanted)))


def _list_source(data: Path) -> tuple[Path, list[str]]:
    """The folder or archive, and the names of its files."""
    if data.is_dir():
        names = [str(path.relative_to(data)) for path in data.rglob("*") if not path.is_dir()]
        archives = [path for path in data.iterdir() if path.name.endswith((".zip", ".tar", ".tar.gz", ".tgz"))]
        if any(map(is_audio_name, names)) or len(archives) != 1:
            return data, names
        data = archives[0]
    try:
        if zipfile.is_zipfile(data):
            with zipfile.ZipFile(data) as archive:
                return data, archive.namelist()
        if tarfile.is_tarfile(data):
            with tarfile.open(data) as archive:
                return data, [member.name for member in archive if member.isfile()]
    except _BROKEN as error:
        raise InputError(f"{data}: is not a whole archive ({error}); get a whole copy") from None
    raise InputError(f"{data}: is neither a folder nor a zip or tar of recordings")


def _members(archive: Path, wanted: Container[str]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the wanted files of a zip or tar, in its order."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                yield from ((name, opened.read(name)) for name in opened.namelist() if name in wanted)
        else:
            with tarfile.open(archive) as opened:  # read through once: a compressed one cannot be sought in
                yield from ((m.name, opened.extractfile(m).read()) for m in opened if m.isfile() and m.name in wanted)
    except _BROKEN as error:
        raise InputError(f"{archive}: is not a whole archive ({error}); get a whole copy") from None


def _content(source: Path, name: str) -> bytes:
    return (source / name).read_bytes() if source.is_dir() else next(_members(source, {name}))[1]


def parse_conditions(
    rows: pl.DataFrame, text: str, flag: str = "--conditions"
) -> tuple[tuple[ConditionConfig, ...], np.ndarray]:
    """Conditions of a model and each row's ids (rows, conditions), from "digit=word,speaker" (name=column or column).

    Values keep the order in which the table first names them; an empty cell means "not given". Errors name the `flag`.
    """
    conditions, ids = [], []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, column = part.partition("=")
        values = _column(rows, column or name, flag).unique(maintain_order=True).drop_nulls().to_list()
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


def texts_of(rows: pl.DataFrame, column: str | None) -> list[str | None]:
    """The text of each row; None where the cell is empty, or for all if there is no column."""
    return [None] * rows.height if column is None else _column(rows, column, "--text").to_list()


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


def split_rules(rows: pl.DataFrame, test: str | None, validation: str | None) -> dict[str, str]:
    """The rules for `split_rows`; instead of None what a column split says, else no test rows, a tenth validation."""
    marked = set(rows["split"]) if "split" in rows.columns else set()
    if test is None:
        test = "split=test" if marked else ""
    if validation is None:
        validation = "split=validation" if "validation" in marked else "0.1"
    return {"test": test, "validation": validation}


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
