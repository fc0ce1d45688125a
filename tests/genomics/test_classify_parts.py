"""dna classify on intervals and windows, on both strands, with tracks and a manifest."""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pysam
import pytest
import torch
from Bio.Seq import Seq
from hypothesis import given, settings
from hypothesis import strategies as st

import seqmodels
from seqmodels import presets
from seqmodels.cli import main
from seqmodels.config import HeadConfig, StrandsConfig
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.classify import classify
from seqmodels.tasks.genomics.inference import Classifier, probabilities
from seqmodels.tasks.genomics.tokens import COMPLEMENT_MAP, encode
from seqmodels.tasks.genomics.tracks import Tracks, means

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    draw = random.Random(0)
    text = "".join(f">{name}\n{''.join(draw.choices('ACGT', k=n))}\n" for name, n in (("chr1", 1003), ("chr2", 90)))
    path.write_text(text + f">gap\n{'N' * 50}\n")
    return path, pysam.FastaFile(str(path))


def logits_of(model, sequences):
    network = seqmodels.load(model)
    with torch.inference_mode():
        return np.stack([network(torch.from_numpy(encode(s.encode()).astype(np.int64))[None])[0] for s in sequences])


def shown(rows, prefix="logit_"):
    return np.array([[float(row[f"{prefix}{name}"]) for name in ("left", "right")] for row in rows])


def rc(sequence):
    return str(Seq(sequence).reverse_complement())


def test_intervals_and_regions_are_classified_on_their_strand(tmp_path, genome, model):
    path, truth = genome
    (tmp_path / "x.bed").write_text("chr1\t10\t400\tone\t0\t-\nchr2\t0\t90\ttwo\nchr1\t990\t1010\tend\t5\t+\n")
    words = ["--bed", tmp_path / "x.bed", "--region", "chr2:11-20", "--region", "chr1:1,000-1,003", "--chunk", "64"]
    words = ["dna", "classify", path, *words, "--model", model, "-o", tmp_path / "o.tsv", "--device", "cpu"]
    assert main([str(word) for word in words]) == 0
    rows = rows_of(tmp_path / "o.tsv")
    places = [tuple(row[c] for c in ("seq", "start", "end", "name", "strand", "padded")) for row in rows]
    assert places == [
        ("chr1", "10", "400", "one", "-", "0"), ("chr2", "0", "90", "two", ".", "0"),
        ("chr1", "990", "1010", "end", "+", "7"),
        ("chr2", "10", "20", "chr2:11-20", "+", "0"), ("chr1", "999", "1003", "chr1:1000-1003", "+", "0"),
    ]  # fmt: skip
    sequences = [
        rc(truth.fetch("chr1", 10, 400)), truth.fetch("chr2"), truth.fetch("chr1", 990) + "N" * 7,
        truth.fetch(region="chr2:11-20"), truth.fetch(region="chr1:1000-1003"),
    ]  # fmt: skip
    np.testing.assert_allclose(shown(rows), logits_of(model, sequences), atol=2e-5)
    (tmp_path / "l.tsv").write_text("record\tlabel\n" + "".join(f"{row['name']}\tleft\n" for row in rows))
    words = ["dna", "evaluate", tmp_path / "o.tsv", "--labels", tmp_path / "l.tsv", "--resamples", 10]
    assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize("chunk", [64, 4096])
@pytest.mark.parametrize("placed", [False, True])
def test_both_strands_are_averaged_and_their_difference_is_told(tmp_path, genome, model, chunk, placed):
    path, truth = genome
    options = {"model": model, "device": "cpu", "chunk": chunk, "region": ["chr1", "chr2"] if placed else None}
    tables = {}
    for strand in ("fwd", "rev", "both"):
        classify([path], output=tmp_path / f"{strand}.tsv", strand=strand, **options)
        tables[strand] = rows_of(tmp_path / f"{strand}.tsv")[:2]
    given = [truth.fetch("chr1"), truth.fetch("chr2")]
    fwd, rev = logits_of(model, given), logits_of(model, map(rc, given))
    np.testing.assert_allclose(shown(tables["fwd"]), fwd, atol=2e-5)
    np.testing.assert_allclose(shown(tables["rev"]), rev, atol=2e-5)
    np.testing.assert_allclose(shown(tables["both"]), (fwd + rev) / 2, atol=2e-5)
    delta = np.abs(probabilities(fwd) - probabilities(rev)).max(1)
    assert delta.min() > 1e-4
    np.testing.assert_allclose([float(row["strand_delta"]) for row in tables["both"]], delta, atol=1e-5)
    for row, f, r in zip(tables["both"], fwd, rev, strict=True):
        assert (row["label_fwd"], row["label_rev"]) == tuple(("left", "right")[i.argmax()] for i in (f, r))
        assert row["strands"] == "both"


@pytest.mark.parametrize("targets", ["multi", "regression"])
def test_several_labels_and_numbers_have_their_own_columns(tmp_path, genome, make_model, targets):
    folder = make_model(head=HeadConfig(task="sequence", labels=("left", "right"), targets=targets))
    options = {"model": folder, "device": "cpu", "window": 100, "strand": "both", "track": tmp_path / "t"}
    assert classify([genome[0]], output=tmp_path / "o.tsv", **options) == 0
    rows = rows_of(tmp_path / "o.tsv")[:-1]
    parts = [genome[1].fetch(row["seq"], int(row["start"]), int(row["end"])) for row in rows]
    logits = (logits_of(folder, parts) + logits_of(folder, map(rc, parts))) / 2
    scores = logits if targets == "regression" else 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(shown(rows, "value_" if targets == "regression" else "p_"), scores, atol=2e-5)
    if targets == "regression":
        assert not {"label", "prob", "label_fwd", "p_left", "logit_left"} & rows[0].keys()
        with pytest.raises(InputError, match="use bedgraph or bigwig"):
            classify([genome[0]], output=tmp_path / "o.tsv", track_format="bed", **options)
    else:
        names = [";".join(n for n, p in zip(("left", "right"), pair, strict=True) if p >= 0.5) for pair in scores]
        assert [row["label"] for row in rows] == names
    assert not (tmp_path / "t.labels.bed").exists()
    assert (tmp_path / "t.left.bedgraph").read_text().startswith("chr1\t0\t100\t")


def test_a_model_of_both_strands_shows_no_difference_and_reads_once(tmp_path, genome, make_model, monkeypatch):
    backbone = presets.mamba2(16, 1, d_state=8, head_dim=16, chunk_size=16, bidirectional=True)
    backbone = dataclasses.replace(backbone, strands=StrandsConfig(complement_map=COMPLEMENT_MAP))
    folder = make_model(backbone=backbone)
    batch, seen = Classifier.batch, []
    monkeypatch.setattr(Classifier, "batch", lambda self, tokens: seen.extend(tokens) or batch(self, tokens))
    options = {"model": folder, "device": "cpu", "region": ["chr1:5-900", "chr2"]}
    classify([genome[0]], output=tmp_path / "both.tsv", strand="both", **options)
    assert len(seen) == 2
    rows = rows_of(tmp_path / "both.tsv")
    assert [row["strand_delta"] for row in rows] == ["0", "0"]
    sequences = [genome[1].fetch(region="chr1:5-900"), genome[1].fetch("chr2")]
    for strands in (sequences, map(rc, sequences)):
        np.testing.assert_allclose(shown(rows), logits_of(folder, strands), atol=2e-5)


def test_windows_along_records_and_their_tracks(tmp_path, genome, model):
    path, truth = genome
    options = {"model": model, "device": "cpu", "window": 200, "stride": 150, "batch_tokens": 1000}
    assert (
        classify([path], output=tmp_path / "o.tsv", track=tmp_path / "t", **options) == 0
    )  # though a window has only N
    rows = rows_of(tmp_path / "o.tsv")
    starts = [0, 150, 300, 450, 600, 750, 803]
    assert [(r["seq"], int(r["start"]), int(r["end"])) for r in rows] == [
        *(("chr1", s, s + 200) for s in starts), ("chr2", 0, 90), ("gap", 0, 50)
    ]  # fmt: skip
    assert (rows[-1]["status"], rows[-1]["label"]) == ("only_n", "")
    expected = logits_of(model, [truth.fetch("chr1", s, s + 200) for s in starts] + [truth.fetch("chr2")])
    np.testing.assert_allclose(shown(rows[:-1]), expected, atol=2e-5)

    by_base = {seq: [[] for _ in range(truth.get_reference_length(seq))] for seq in truth.references}
    for row in rows[:-1]:
        for i in range(int(row["start"]), int(row["end"])):
            by_base[row["seq"]][i].append(float(row["p_left"]))
    lines = [line.split("\t") for line in (tmp_path / "t.left.bedgraph").read_text().splitlines()]
    assert lines == sorted(lines, key=lambda line: (line[0], int(line[1])))
    covered = {seq: np.full(len(values), np.nan) for seq, values in by_base.items()}
    for seq, a, b, p in lines:
        assert np.isnan(covered[seq][int(a) : int(b)]).all()  # no overlap
        covered[seq][int(a) : int(b)] = float(p)
    for seq, values in by_base.items():
        means_ = [np.mean(v) if v else np.nan for v in values]
        np.testing.assert_allclose(covered[seq], means_, rtol=1e-5)
    called = [line.split("\t") for line in (tmp_path / "t.labels.bed").read_text().splitlines()]
    for seq, a, b, label, score, *_ in called:
        assert {label} == {"left" if p > 0.5 else "right" for p in covered[seq][int(a) : int(b)]}
        part = covered[seq][int(a) : int(b)]
        assert abs(int(score) - 1000 * np.maximum(part, 1 - part).mean()) <= 1
    assert all(not (x[0] == y[0] and x[2] == y[1] and x[3] == y[3]) for x, y in itertools.pairwise(called))
    assert sorted(os.listdir(tmp_path)) == [
        "o.tsv",
        "o.tsv.json",
        "t.labels.bed",
        "t.left.bedgraph",
        "t.right.bedgraph",
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.integers(0, 8)), min_size=1, max_size=12))
def test_stretches_have_the_mean_of_the_windows_over_them(windows):
    starts, sizes, values = map(np.array, zip(*windows, strict=True))
    found = np.full(60, np.nan)
    for a, b, v in zip(*means(starts, starts + sizes, values[:, None].astype(float)), strict=True):
        assert a < b
        assert np.isnan(found[a:b]).all()
        found[a:b] = v[0]
    each = [[v for s, n, v in windows if s <= i < s + n] for i in range(60)]
    np.testing.assert_allclose(found, [np.mean(v) if v else np.nan for v in each], atol=1e-12)


def test_bigwig_tracks_say_what_bedgraph_says(tmp_path, genome, model):
    pyBigWig = pytest.importorskip("pyBigWig")
    options = {"model": model, "device": "cpu", "window": 100, "stride": 70, "region": ["chr2:50-200", "chr1:-900"]}
    for kind in ("bedgraph", "bigwig", "bed"):
        classify([genome[0]], output=tmp_path / f"{kind}.tsv", track=tmp_path / kind, track_format=kind, **options)
    with pyBigWig.open(str(tmp_path / "bigwig.right.bw")) as file:
        assert file.chroms() == {"chr1": 1003, "chr2": 90, "gap": 50}
        found = [(seq, *entry) for seq in ("chr1", "chr2") for entry in file.intervals(seq)]
    lines = [line.split("\t") for line in (tmp_path / "bedgraph.right.bedgraph").read_text().splitlines()]
    assert [(seq, str(a), str(b)) for seq, a, b, _ in found] == [tuple(line[:3]) for line in lines]
    np.testing.assert_allclose([v for *_, v in found], [float(line[3]) for line in lines], rtol=1e-5)
    assert lines[-1][2] == "90"  # though the window goes on
    beds = [line.split("\t") for line in (tmp_path / "bed.right.bed").read_text().splitlines()]
    assert [line[:3] for line in beds] == [line[:3] for line in lines]
    assert all(abs(int(b[4]) - 1000 * float(line[3])) <= 0.6 for b, line in zip(beds, lines, strict=True))


def test_without_pybigwig_the_way_out_is_told(tmp_path, genome, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyBigWig", None)
    with pytest.raises(InputError, match="pip install pyBigWig, or --track-format bedgraph"):
        classify([genome[0]], model=model, window=100, track=tmp_path / "t", track_format="bigwig")
    assert os.listdir(tmp_path) == []


def test_tracks_take_sequences_of_a_name_once():
    tracks = Tracks.__new__(Tracks)
    tracks._files, tracks._places, tracks._chances, tracks._ends, tracks._classes = {}, {}, {}, {}, ()
    row = {"seq": "a", "start": 0, "end": 5, "file": "x", "status": "ok", "label": "l", "p_l": 1.0}
    tracks.add([row, row | {"file": "y"}, row | {"status": "duplicate"}, row | {"start": 5, "end": 9}], ("l",))
    assert tracks._places["a"].tolist() == [0, 5, 5, 9]


def test_windows_of_intervals_resume_to_the_same_table_and_tracks(tmp_path, genome, model):
    (tmp_path / "x.gff").write_text(
        "chr1\tx\tgene\t1\t1000\t.\t-\t.\tID=g\nchr2\tx\tgene\t5\t90\t.\t+\t.\tID=h\nchr1\tx\tCDS\t1\t9\t.\t+\t0\tID=c\n"
    )
    options = {"model": model, "device": "cpu", "bed": tmp_path / "x.gff", "feature": ["gene"], "window": 60}
    options |= {"stride": 25, "batch_tokens": 120, "strand": "both", "chunk": 50}
    classify([genome[0]], output=tmp_path / "o.tsv", track=tmp_path / "t", **options)
    names = ["o.tsv", "t.left.bedgraph", "t.labels.bed"]
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    manifest = json.loads((tmp_path / "o.tsv.json").read_text())
    assert whole["o.tsv"].count(b"\n") == 1 + 39 + 3
    lines = whole["o.tsv"].splitlines(keepends=True)
    for name in names:
        (tmp_path / name).unlink()
    (tmp_path / "o.tsv.part").write_bytes(b"".join(lines[:20]) + lines[20][:30])
    (tmp_path / "o.tsv.json").rename(tmp_path / "o.tsv.part.json")
    said = classify([genome[0]], output=tmp_path / "o.tsv", track=tmp_path / "t", resume=True, **options)
    assert said == 0
    assert {name: (tmp_path / name).read_bytes() for name in names} == whole
    again = json.loads((tmp_path / "o.tsv.json").read_text())
    assert again["outputs"] == manifest["outputs"]
    assert again["status"] == {"ok": 42}
    with pytest.raises(InputError, match="tsv was made otherwise: stride was 25 and is 26; repeat that"):
        classify([genome[0]], output=tmp_path / "o.tsv", resume=True, **{**options, "stride": 26})


def test_the_manifest_says_what_made_a_table(tmp_path, genome, model, capsys):
    path = genome[0]
    (tmp_path / "x.bed").write_text("chr1\t0\t9\nchrX\t0\t9\tlost\n")
    (tmp_path / "o.csv.json").write_text("of an older table")
    assert classify([path], model=model, device="cpu", bed=tmp_path / "x.bed", output=tmp_path / "o.csv") == 2
    told = capsys.readouterr().err
    assert "x.bed: 1 of 2 intervals are not ok (1 missing); see the columns status and note" in told
    manifest = json.loads((tmp_path / "o.csv.json").read_text())
    weights = hashlib.sha256(Path(model, "model.safetensors").read_bytes()).hexdigest()
    assert manifest["model"]["sha256"]["model.safetensors"] == weights
    assert [(i["file"], i["size"]) for i in manifest["inputs"]] == [
        (str(path), path.stat().st_size),
        (str(tmp_path / "x.bed"), 23),
    ]
    assert manifest["status"] == {"missing": 1, "ok": 1}
    assert manifest["problems"] == [told.strip().removeprefix("longseq: ")]
    table = hashlib.sha256((tmp_path / "o.csv").read_bytes()).hexdigest()
    assert manifest["outputs"] == [
        {"file": str(tmp_path / "o.csv"), "size": (tmp_path / "o.csv").stat().st_size, "sha256": table}
    ]
    assert manifest["settings"]["bed"] == str(tmp_path / "x.bed")


def test_windows_of_broken_records_keep_what_comes_before(tmp_path, model):
    text = ">a\n" + "ACGT" * 30 + "\n" + "AC5T" * 5 + "\n>b\n" + "ACGT" * 10 + "\n>empty\n>a\nACGTAC\n"
    (tmp_path / "x.fa").write_text(text)
    assert classify([tmp_path / "x.fa"], model=model, device="cpu", window=50, output=tmp_path / "o.tsv") == 2
    assert [(r["seq"], r["start"], r["end"], r["status"], r["note"]) for r in rows_of(tmp_path / "o.tsv")] == [
        ("a", "0", "50", "ok", ""), ("a", "50", "100", "ok", ""),
        ("a", "100", "122", "invalid", "'5' at position 123 of a is no base"),
        ("b", "0", "40", "ok", ""), ("empty", "0", "0", "empty", "no bases"),
        ("a", "0", "6", "duplicate", "record 4 has the name of an earlier one"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 0}, "window is 0"), ({"stride": 5}, "give --window too"), ({"track": "t"}, "a track needs places"),
        ({"feature": ["gene"]}, "give --bed too"), ({"region": ["chr1:5-2"]}, "ends before it begins"),
        ({"bed": Path("x.bed"), "feature": ["gene"]}, "x.bed is read as BED, which has no features"),
        ({"bed": Path("none.gff")}, "none.gff does not exist"), ({"bed": Path("empty.bed")}, "has no intervals"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_told_in_one_line(tmp_path, genome, model, options, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.bed").write_text("# nothing\n")
    with pytest.raises(InputError, match=said) as error:
        classify([genome[0]], model=model, device="cpu", output=tmp_path / "o.tsv", **options)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["empty.bed"]
