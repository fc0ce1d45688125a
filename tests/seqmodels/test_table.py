import csv
import errno
import gzip
import io
import json
import os

import polars
import pytest

from seqmodels.display import aligned
from seqmodels.errors import InputError
from seqmodels.table import TableWriter, format_of

COLUMNS = {"name": str, "count": int, "part": float}
ROWS = [
    {"name": 'a "quoted", one', "count": 3, "part": 1 / 3},
    {"name": "b", "count": None, "part": None},
    {"name": "", "count": 0, "part": 1e-9},
]


def write(path, rows=ROWS, **options):
    with TableWriter(path, COLUMNS, **options) as table:
        table.write(rows[:1])
        table.write(rows[1:])


@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.tsv.gz", "x.csv.gz"])
def test_text_tables_hold_every_row_with_six_digits(tmp_path, name):
    write(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    delimiter = "\t" if ".tsv" in name else ","
    quoting = csv.QUOTE_NONE if ".tsv" in name else csv.QUOTE_MINIMAL
    rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting))
    assert rows == [
        ["name", "count", "part"],
        ['a "quoted", one', "3", "0.333333"],
        ["b", "", ""],
        ["", "0", "1e-09"],
    ]


def test_json_lines_hold_every_row(tmp_path):
    write(tmp_path / "x.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert rows == [{**ROWS[0], "part": 0.333333}, *ROWS[1:]]


def test_parquet_holds_every_row_and_its_types_also_without_rows(tmp_path):
    write(tmp_path / "x.parquet")
    frame = polars.read_parquet(tmp_path / "x.parquet")
    assert frame.to_dicts() == ROWS
    write(tmp_path / "y.parquet", rows=[])
    assert polars.read_parquet(tmp_path / "y.parquet").schema == frame.schema


def test_the_same_rows_make_the_same_compressed_file(tmp_path):
    write(tmp_path / "x.tsv.gz")
    first = (tmp_path / "x.tsv.gz").read_bytes()
    os.utime(tmp_path / "x.tsv.gz", (0, 0))
    write(tmp_path / "x.tsv.gz")
    assert (tmp_path / "x.tsv.gz").read_bytes() == first


def test_format_overrides_the_suffix(tmp_path):
    write(tmp_path / "x.dat", format="jsonl")
    assert json.loads((tmp_path / "x.dat").read_text().splitlines()[0])["count"] == 3


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("old")

    def fail():
        with TableWriter(path, COLUMNS) as table:
            table.write(ROWS)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.tsv"]


@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.jsonl"])
def test_a_table_stopped_at_any_row_goes_on_to_the_same_bytes_if_it_is_made_alike(tmp_path, name):
    made = {"settings": {"strand": "fwd"}}
    write(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for rows in range(len(ROWS) + 1):
        path = tmp_path / f"{rows}{name}"
        with pytest.raises(AttributeError):  # a row that is none
            write(path, [*ROWS[:rows], None], resume=["name"], made=made)
        changed = {"resume": ["name"], "made": {"settings": {"strand": "rev"}}}
        if rows:
            with pytest.raises(InputError, match=f"{rows}{name}.part was made otherwise: strand was fwd and is rev"):
                write(path, **changed)
            changed["made"] = made
            with pytest.raises(InputError, match="was not made from this input by this model: it has name a"):
                write(path, [{**ROWS[0], "name": "z"}, *ROWS[1:]], **changed)
        write(path, **changed)
        assert path.read_bytes() == whole
    assert len(os.listdir(tmp_path)) == 2 + len(ROWS)


@pytest.mark.parametrize("name", ["x", "x.xlsx", "x.gz", "x.parquet.gz"])
def test_an_unknown_suffix_is_told(tmp_path, name):
    with pytest.raises(InputError, match="suffix"):
        format_of(tmp_path / name)


def test_an_unwritable_place_is_told(tmp_path):
    (tmp_path / "folder.tsv").mkdir()
    for path, message in ((tmp_path / "missing" / "x.tsv", "cannot write"), (tmp_path / "folder.tsv", "is a folder")):
        with pytest.raises(InputError, match=message):
            write(path)


def test_a_full_disk_is_told_in_one_line(monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sys.stdout", Full())
    with pytest.raises(InputError, match="cannot write standard output: No space left"):
        write(None, format="tsv")


def test_without_a_path_the_table_goes_to_standard_output_as_tsv(capsys):
    write(None)
    assert capsys.readouterr().out.splitlines()[2] == "b\t\t"


def test_a_terminal_gets_aligned_columns(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    write(None, shown=["name", "part"])
    assert capsys.readouterr().out == (
        'name                 part\na "quoted", one  0.333333\nb\n                    1e-09\n'
    )
    assert aligned([], ["name"]) == ""
