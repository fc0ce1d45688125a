"""Public data sets: their official file formats, and downloads from a server on this machine."""

import base64
import gzip
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import polars
import pytest

from seqmodels.cli import main
from seqmodels.downloads import Remote
from seqmodels.errors import InputError
from seqmodels.tasks.genomics import public
from seqmodels.tasks.genomics.labelled import load_labelled, splits_of
from seqmodels.tasks.genomics.public import COLLECTIONS, Collection, get
from seqmodels.tasks.genomics.tokens import decode

ROWS = {"train": [("ACGTA", "1"), ("GGGTC", "0"), ("TTTAN", "1")], "dev": [("CCC", "0")], "test": [("ACGTT", "1")]}


def texts(records):
    labels = [records.classes[label] for label in records.labels]
    return list(zip(map(decode, records.tokens), labels, strict=True))


def csv(rows, header="sequence,label"):
    return "\n".join([header, *(f"{s},{label}" for s, label in rows)]) + "\n"


def gue(folder):
    for split, rows in ROWS.items():
        (folder / f"{split}.csv").write_text(csv(rows))


def gue_compressed(folder):
    for split, rows in ROWS.items():
        (folder / f"{split}.csv.gz").write_bytes(gzip.compress(csv(rows).encode()))


def nucleotide_transformer(folder):
    for split, rows in ROWS.items():
        if split != "dev":
            (folder / f"{split}.fna").write_text("".join(f">chr1 {i}|{r[1]}\n{r[0]}\n" for i, r in enumerate(rows)))


def parquet(folder):
    for split, rows in ROWS.items():
        frame = polars.DataFrame({"sequence": [r[0] for r in rows], "name": "x", "label": [int(r[1]) for r in rows]})
        frame.write_parquet(folder / f"{split}.parquet")


def parquet_of_the_hub(folder):
    (folder / "data").mkdir()
    for split, rows in ROWS.items():
        name = "validation" if split == "dev" else split
        parts = np.array_split(np.arange(len(rows)), min(2, len(rows)))
        for k, part in enumerate(parts):
            frame = polars.DataFrame({"seq": [rows[i][0] for i in part], "label": [int(rows[i][1]) for i in part]})
            frame.write_parquet(folder / "data" / f"{name}-{k:05}-of-{len(parts):05}.parquet")


def genomic_benchmarks(folder):
    for split, rows in ROWS.items():
        if split != "dev":
            for kind in ("1", "0"):  # also a class without a sequence here
                (folder / split / kind).mkdir(parents=True)
            (folder / split / ".DS_Store").write_bytes(b"\xff")
            for i, (sequence, label) in enumerate(rows):
                text = f">own header\n{sequence}\n" if i == 1 else sequence
                (folder / split / label / f"{i + 8}.txt").write_text(text)


FORMATS = [gue, gue_compressed, nucleotide_transformer, parquet, parquet_of_the_hub, genomic_benchmarks]


@pytest.mark.parametrize("write", FORMATS)
def test_official_formats_give_the_same_records_and_splits(write, tmp_path):
    write(tmp_path)
    splits = splits_of(tmp_path)
    assert splits == (("train", "test") if write in (nucleotide_transformer, genomic_benchmarks) else tuple(ROWS))
    classes = load_labelled(tmp_path, split="train").classes
    assert classes == ("0", "1")
    for split in splits:
        found = texts(load_labelled(tmp_path, split=split, classes=classes))
        assert sorted(found) == sorted(ROWS[split])
        assert write is genomic_benchmarks or found == ROWS[split]


def test_a_column_names_the_split_of_each_row(tmp_path):
    rows = [f"{s},{label},{split}" for split, own in ROWS.items() for s, label in own]
    (tmp_path / "x.csv").write_text("sequence,label,split\n" + "\n".join(rows) + "\n")
    assert splits_of(tmp_path / "x.csv") == tuple(ROWS)
    found = load_labelled(tmp_path / "x.csv", split="test")
    assert texts(found) == ROWS["test"]
    assert found.names == ["row_6"]  # its line


def test_numbers_of_files_are_ordered_as_numbers(tmp_path):
    (tmp_path / "kind").mkdir()
    for name in ("10.txt", "9.txt", "100.txt"):
        (tmp_path / "kind" / name).write_text("ACGT")
    assert load_labelled(tmp_path).names == ["kind/9", "kind/10", "kind/100"]


def test_several_labels_and_numbers_are_read(tmp_path):
    (tmp_path / "names.csv").write_text("sequence,label\nACG,b;a\nCCC,\nGGG,c\n")
    records = load_labelled(tmp_path / "names.csv", targets="multi")
    assert records.classes == ("a", "b", "c")
    assert records.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    (tmp_path / "columns.csv").write_text("sequence,label_dnase,label_ctcf\nACG,1,0\nCCC,,1\n")
    records = load_labelled(tmp_path / "columns.csv", targets="multi")
    assert records.classes == ("ctcf", "dnase")
    np.testing.assert_array_equal(records.labels, [[0, 1], [1, np.nan]])
    (tmp_path / "x.fa").write_text(">r\nACGT\n>q\nCCCC\n")
    (tmp_path / "values.tsv").write_text("record\tlabel\nq\t-1.5e1\nr\t2\n")
    records = load_labelled(tmp_path / "x.fa", tmp_path / "values.tsv", targets="regression")
    assert records.classes == ("value",)
    assert records.labels.tolist() == [[2], [-15]]


BAD = [
    (lambda d: (gue(d), (d / "train.csv.gz").write_bytes(b"")), {}, "has train.csv and train.csv.gz for one split"),
    (lambda d: gue(d), {"split": "third"}, "has no split 'third'; it has train, dev, test"),
    (lambda d: (d / "train.fna").write_text(">a\nACGT\n"), {}, "record 'a' has no |label at its end"),
    (lambda d: (d / "train.parquet").write_bytes(b"PAR1nonsense"), {}, "train.parquet"),
    (lambda d: (d / "train.csv").write_text("sequence,label\nACGT,\n"), {}, "line 2 has no label"),
    (lambda d: (d / "train.csv").write_text("sequence,label\nACXJ,1\n"), {}, "line 2: 'J' at position 4 is no base"),
    (lambda d: (d / "train" / "x").mkdir(parents=True), {}, "no folders of classes with sequences"),
    (lambda d: ((d / "x").mkdir(), (d / "x" / "1.txt").write_bytes(b"\xff\xfe")), {}, "1.txt is not text in UTF-8"),
    (lambda d: ((d / "x").mkdir(), (d / "x" / "1.txt").write_bytes(b"ACQ")), {}, "1.txt: 'Q' at position 3"),
    (lambda d: (d / "train.data").write_text("EI, name\n"), {}, "line 1 is not 'class, name, sequence'"),
    (lambda d: (d / "train.csv").write_text("sequence,label\nA,one\n"), {"targets": "regression"}, "'one' of row_2 is"),
    (lambda d: (d / "train.csv").write_text("sequence,label_x\nA,2\n"), {"targets": "multi"}, "is not 0, 1 or nothing"),
    (lambda d: (d / "train.csv").write_text("sequence,label_x\nA,\n"), {"targets": "multi"}, "no label for row_2"),
    (lambda d: (d / "train.csv").write_text("sequence,label_x\nA,1\n"), {}, "say with --targets"),
]


@pytest.mark.parametrize(("write", "options", "message"), BAD)
def test_bad_files_are_told_in_one_line(tmp_path, write, options, message):
    write(tmp_path)
    with pytest.raises(InputError) as error:
        load_labelled(tmp_path, **{"split": "train", **options})
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.data
def test_the_splice_junctions_have_the_classes_of_their_description():
    path = Path(os.environ["LONGSEQ_DATA"]) / "dna" / "uci_splice" / "splice.data.gz"
    records = load_labelled(path)
    assert dict(zip(records.classes, np.bincount(records.labels).tolist(), strict=True)) == {
        "EI": 767, "IE": 768, "N": 1655,
    }  # fmt: skip


@pytest.mark.data
def test_the_table_of_sizes_is_that_of_the_files():
    folder = Path(os.environ["LONGSEQ_DATA"]) / "dna" / "gue"
    for name in ("mouse/2", "prom/prom_core_tata"):
        found = tuple(len(load_labelled(folder / name, split=split).names) for split in splits_of(folder / name))
        assert found == COLLECTIONS["gue"].tasks[name].records


def test_the_collections_have_their_published_numbers_of_tasks():
    counts = {name: len(collection.tasks) for name, collection in COLLECTIONS.items()}
    assert counts == {"genomic-benchmarks": 9, "nt": 18, "nt-revised": 18, "gue": 28}


def test_info_counts_classes_lengths_and_what_is_also_in_train(tmp_path, capsys):
    (tmp_path / "train.csv").write_text(csv([("ACGTA", "0"), ("ACGTA", "0"), ("GGGTCN", "1")]))
    (tmp_path / "test.csv").write_text(csv([("TACGT", "0"), ("CCCC", "1")]))  # the other strand of the first
    assert main(["dna", "data", "info", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "3", "5", "5", "6", "6.2500%", "1", "-"] in lines
    assert ["test", "2", "4", "4", "5", "0.0000%", "0", "1"] in lines
    assert ["train", "2", "1"] in lines


def test_list_shows_every_task(capsys):
    assert main(["dna", "data", "list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{group}/{task}" in out for group, one in COLLECTIONS.items() for task in one.tasks)
    assert main(["dna", "data", "get", "nothing"]) == 2
    assert main(["dna", "data", "get", "nothing", "here"]) == 2
    assert "known are genomic-benchmarks, nt, nt-revised, gue, hg38 (" in capsys.readouterr().err


def zipped(root):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for split, rows in ROWS.items():
            archive.writestr(f"{root}/tf/0/{split}.csv", csv(rows))
    return content.getvalue()


def test_a_download_is_checked_unpacked_whole_and_can_be_pinned(server, tmp_path, monkeypatch):
    folder, address = server
    archive = zipped("GUE")
    (folder / "all.zip").write_bytes(archive)
    monkeypatch.setitem(
        COLLECTIONS, "gue", Collection("x", f"{address}/all.zip", tuple(ROWS), COLLECTIONS["gue"].tasks)
    )
    get("gue/tf/0", tmp_path)
    assert texts(load_labelled(tmp_path / "gue" / "tf" / "0", split="dev")) == ROWS["dev"]
    source = tmp_path / "gue" / "source.json"
    assert json.loads(source.read_text())["files"]["gue.zip"]["sha256"] == hashlib.sha256(archive).hexdigest()
    (folder / "all.zip").unlink()
    get("gue", tmp_path)  # is there already
    (folder / "all.zip").write_bytes(zipped("other"))
    with pytest.raises(InputError, match="but the pin says"):
        get("gue", tmp_path / "second", pin=source)
    assert not list((tmp_path / "second").rglob("*.csv"))
    (folder / "all.zip").write_bytes(archive[:-40])
    with pytest.raises(InputError, match="not a whole zip archive"):
        get("gue", tmp_path / "second")
    (folder / "all.zip").write_bytes(archive)
    get("gue", tmp_path / "second", pin=source)


def test_a_published_checksum_that_differs_refuses_the_file(server, tmp_path, monkeypatch):
    folder, address = server
    (folder / "train.csv").write_text(csv(ROWS["train"]))
    good = hashlib.sha256((folder / "train.csv").read_bytes()).hexdigest()
    for checksum, fine in ((f"sha256:{good}", True), ("md5:" + "0" * 32, False)):
        files = [Remote(f"{address}/train.csv", "train.csv", checksum)]
        monkeypatch.setattr(public, "on_hub", lambda *_, files=files: files)
        if fine:
            assert splits_of(get("nt/H3", tmp_path / "fine")) == ("train",)
        else:
            with pytest.raises(InputError, match="hash"):
                get("nt/H3", tmp_path / "bad")
            assert not list((tmp_path / "bad").rglob("*.csv"))


def test_the_human_genome_is_downloaded_checked_and_pretrained_on(server, tmp_path, monkeypatch, capsys):
    folder, address = server
    monkeypatch.setattr(public, "_GOOGLE", address)
    genome = gzip.compress(b">chr1\n" + b"ACGTTGCAnnacgtGGAT" * 60 + b"\n", mtime=0)
    intervals = b"chr1\t0\t600\ttrain\nchr1\t600\t900\tvalid\nchr1\t900\t1080\ttest\n"
    bucket = public.GENOMES["hg38"].bucket
    about = folder / "storage" / "v1" / "b" / bucket / "o"
    about.mkdir(parents=True)
    (folder / bucket).mkdir()
    for name, content in (("hg38.ml.fa.gz", genome), ("sequences_human.bed", intervals)):
        (folder / bucket / name).write_bytes(content)
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        (about / name).write_text(json.dumps({"name": name, "md5Hash": md5}))
    assert main(["dna", "data", "get", "hg38", str(tmp_path)]) == 0
    place = tmp_path / "hg38"
    assert {path.name for path in place.iterdir()} == {"hg38.ml.fa.gz", "human-sequences.bed", "source.json"}
    published = json.loads((place / "source.json").read_text())["files"]["hg38.ml.fa.gz"]["published"]
    assert published == f"md5:{hashlib.md5(genome).hexdigest()}"
    words = f"dna pretrain {place}/hg38.ml.fa.gz {tmp_path}/run --bed {place}/human-sequences.bed --device cpu"
    words += " --window 64 --batch-tokens 256 --d-model 32 --n-layer 1"
    words += " --max-steps 2 --validate-every 2 --validation-windows 2"
    assert main(words.split()) == 0
    (folder / bucket / "hg38.ml.fa.gz").write_bytes(genome[:-9])
    assert main(["dna", "data", "get", "hg38", str(tmp_path / "again")]) == 2
    assert "hash" in capsys.readouterr().err
    assert not (tmp_path / "again" / "hg38").exists()
