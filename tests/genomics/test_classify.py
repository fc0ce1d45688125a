import csv
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import polars
import pytest
import torch
from Bio import bgzf

import seqmodels
from seqmodels.config import AttentionConfig, BackboneConfig, HeadConfig
from seqmodels.errors import InputError
from seqmodels.table import TableWriter
from seqmodels.tasks.genomics import inference
from seqmodels.tasks.genomics.classify import classify
from seqmodels.tasks.genomics.inference import Classifier, batches_by_length
from seqmodels.tasks.genomics.tokens import encode


def bases(seed, length):
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length))


def fasta(*lengths):
    return "".join(f">r{i} of {n}\n{bases(i, n)}\n" for i, n in enumerate(lengths))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def run(tmp_path, text, model, **options):
    """Exit code and rows for FASTA text."""
    (tmp_path / "in.fa").write_text(text, newline="")
    code = classify([tmp_path / "in.fa"], model=model, output=tmp_path / "out.tsv", device="cpu", **options)
    return code, rows_of(tmp_path / "out.tsv")


def logits_of(rows):
    return np.array([[float(row["logit_left"]), float(row["logit_right"])] for row in rows])


def expected_logits(model, sequence):
    """The model's answer to a whole sequence in a single pass, by itself."""
    network = seqmodels.load(model)
    with torch.inference_mode():
        return network(torch.from_numpy(encode(sequence.encode()).astype(np.int64))[None])[0].numpy()


def test_every_record_has_its_row_in_order_with_its_statistics(tmp_path, model):
    text = ">a first one\nACGTNacgr-\n>b\n" + bases(0, 300) + "\n>c\tx\nGG\n"
    code, rows = run(tmp_path, text, model)
    assert code == 0
    assert list(rows[0]) == [
        "record_id", "description", "file", "length", "n_frac", "ambiguous", "softmask_frac", "label", "prob",
        "p_left", "p_right", "logit_left", "logit_right", "status", "note", "reading", "model",
    ]  # fmt: skip
    assert [row["record_id"] for row in rows] == ["a", "b", "c"]
    assert [row["description"] for row in rows] == ["first one", "", "x"]
    assert [row["length"] for row in rows] == ["10", "300", "2"]
    assert (rows[0]["n_frac"], rows[0]["ambiguous"], rows[0]["softmask_frac"]) == ("0.3", "2", "0.4")
    for row in rows:
        p = {name: float(row[f"p_{name}"]) for name in ("left", "right")}
        assert sum(p.values()) == pytest.approx(1, abs=1e-5)
        assert float(row["prob"]) == p[row["label"]] == max(p.values())
        assert np.log(p["left"] / p["right"]) == pytest.approx(
            float(row["logit_left"]) - float(row["logit_right"]), abs=1e-4
        )
        assert (row["status"], row["model"]) == ("ok", model)


def test_lower_case_and_u_change_nothing_but_the_statistics(tmp_path, model):
    sequence = bases(0, 200)
    text = f">a\n{sequence}\n>b\n{sequence.lower()}\n>c\n{sequence.replace('T', 'U')}\n"
    _, rows = run(tmp_path, text, model)
    assert len({(row["logit_left"], row["logit_right"]) for row in rows}) == 1
    assert [row["softmask_frac"] for row in rows] == ["0", "1", "0"]


@pytest.mark.parametrize("chunk", [16, 100, 333, 5000])
def test_a_record_in_chunks_gets_the_answer_of_a_single_pass(tmp_path, model, chunk):
    _, rows = run(tmp_path, fasta(1000, 333, 16), model, chunk=chunk)
    expected = [expected_logits(model, bases(i, n)) for i, n in enumerate((1000, 333, 16))]
    np.testing.assert_allclose(logits_of(rows), expected, atol=2e-5)


def test_neighbours_in_a_batch_do_not_change_the_answer(tmp_path, model):
    lengths = (5, 300, 70, 2, 120, 299, 1)
    _, together = run(tmp_path, fasta(*lengths), model)
    _, alone = run(tmp_path, fasta(*lengths), model, batch_tokens=1)
    np.testing.assert_allclose(logits_of(together), logits_of(alone), atol=2e-5)
    np.testing.assert_allclose(
        logits_of(together), [expected_logits(model, bases(i, n)) for i, n in enumerate(lengths)], atol=2e-5
    )


def test_batches_keep_to_the_budget_and_hold_every_sequence_once():
    lengths = np.random.default_rng(0).integers(1, 500, 200).tolist()
    batches = list(batches_by_length(lengths, 1000))
    assert sorted(i for places in batches for i in places) == list(range(200))
    assert all(len(places) * max(lengths[i] for i in places) <= 1000 for places in batches)


def test_plain_gzip_bgzf_and_standard_input_give_the_same_rows(tmp_path, model, monkeypatch):
    text = fasta(50, 400, 30)
    _, expected = run(tmp_path, text, model)
    (tmp_path / "g.fna.gz").write_bytes(gzip.compress(text.encode()))
    with bgzf.open(tmp_path / "b.fasta.gz", "wb") as file:
        file.write(text.encode())
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(text.encode())))
    for source, name in (("g.fna.gz", None), ("b.fasta.gz", None), ("-", "standard input")):
        path = tmp_path / source if name is None else source
        assert classify([path], model=model, output=tmp_path / "o.tsv", device="cpu") == 0
        assert rows_of(tmp_path / "o.tsv") == [{**row, "file": name or str(path)} for row in expected]


def test_all_formats_say_the_same(tmp_path, model):
    _, rows = run(tmp_path, fasta(50, 20) + ">empty\n", model)
    for name in ("o.csv", "o.jsonl", "o.parquet", "o.tsv.gz"):
        classify([tmp_path / "in.fa"], model=model, output=tmp_path / name, device="cpu")
    with open(tmp_path / "o.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows
    assert gzip.decompress((tmp_path / "o.tsv.gz").read_bytes()) == (tmp_path / "out.tsv").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    frame = polars.read_parquet(tmp_path / "o.parquet")
    assert frame["length"].dtype == polars.Int64
    for i, row in enumerate(rows):
        for source in (lines[i], frame.row(i, named=True)):
            shown = {k: "" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in source.items()}
            assert shown == row


def test_without_an_output_the_table_goes_to_standard_output(tmp_path, model, capsys):
    run(tmp_path, fasta(50, 20), model)
    classify([tmp_path / "in.fa"], model=model, device="cpu")
    assert capsys.readouterr().out == (tmp_path / "out.tsv").read_text()


def test_a_terminal_shows_an_aligned_table(tmp_path, model, capsys, monkeypatch):
    (tmp_path / "in.fa").write_text(fasta(50, 2000))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    classify([tmp_path / "in.fa"], model=model, device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["record_id", "length", "n_frac", "label", "prob", "status", "note"]
    assert [line.index("length") + 6 for line in lines[:1]] == [lines[2].index("2000") + 4]


PARTLY_BAD = f""">good
{bases(0, 40)}
>only_n
NNNNnnnn--
>empty
>digits
ACGTAC
GT5ACG
>good
{bases(1, 30)}
>invalid_and_long
{bases(2, 90)}é
>last
{bases(3, 30)}
"""


@pytest.mark.parametrize("chunk", [16384, 16])
def test_bad_records_keep_their_rows_and_good_ones_their_answers(tmp_path, model, capsys, chunk):
    code, rows = run(tmp_path, PARTLY_BAD, model, chunk=chunk)
    assert code == 2
    assert [(row["record_id"], row["status"], row["note"]) for row in rows] == [
        ("good", "ok", ""),
        ("only_n", "only_n", "no A, C, G or T"),
        ("empty", "empty", "no bases"),
        ("digits", "invalid", "'5' at position 9 is no base"),
        ("good", "duplicate", "record 5 has the name of an earlier one"),
        ("invalid_and_long", "invalid", "'é' at position 91 is no base"),
        ("last", "ok", ""),
    ]
    assert [row["label"] != "" for row in rows] == [True, False, False, False, True, False, True]
    good = [rows[i] for i in (0, 4, 6)]
    expected = [expected_logits(model, bases(i, n)) for i, n in ((0, 40), (1, 30), (3, 30))]
    np.testing.assert_allclose(logits_of(good), expected, atol=2e-5)
    told = capsys.readouterr().err
    assert "5 of 7 records are not ok (1 duplicate, 1 empty, 2 invalid, 1 only_n)" in told
    assert told.count("\n") == 1


def test_good_files_among_bad_ones_get_their_rows(tmp_path, model, capsys):
    (tmp_path / "a.fa").write_text(fasta(20, 30))
    (tmp_path / "text.fa").write_text("no fasta\n")
    (tmp_path / "b.fa").write_text(fasta(20))
    files = [tmp_path / name for name in ("a.fa", "missing.fa", "text.fa", "b.fa")]
    assert classify(files, model=model, output=tmp_path / "o.tsv", device="cpu") == 2
    rows = rows_of(tmp_path / "o.tsv")
    assert [(os.path.basename(row["file"]), row["record_id"], row["status"]) for row in rows] == [
        ("a.fa", "r0", "ok"), ("a.fa", "r1", "ok"), ("b.fa", "r0", "ok")
    ]  # fmt: skip
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert "missing.fa does not exist" in told[0]
    assert "text.fa has no FASTA record" in told[1]


def test_records_before_a_cut_get_their_rows(tmp_path, model, capsys):
    text = "".join(f">r{i}\n{bases(i, 60)}\n" for i in range(300))
    data = gzip.compress(text.encode())
    (tmp_path / "x.fa.gz").write_bytes(data[: len(data) // 2])
    assert classify([tmp_path / "x.fa.gz"], model=model, output=tmp_path / "o.tsv", device="cpu") == 2
    rows = rows_of(tmp_path / "o.tsv")
    assert len(rows) > 50
    assert [row["status"] for row in rows] == ["ok"] * (len(rows) - 1) + ["truncated"]
    assert "cut off" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no fasta", b"\x7fELF\0\0\0", gzip.compress(b">a\nAC\n", mtime=0)[:10]])
def test_a_file_without_a_record_leaves_no_output(tmp_path, model, content):
    (tmp_path / "x.fa").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.fa"):
        classify([tmp_path / "x.fa"], model=model, output=tmp_path / "o.tsv", device="cpu")
    assert os.listdir(tmp_path) == ["x.fa"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "missing/o.tsv"}, "cannot write"),
        ({"output": ".", "format": "csv"}, "is a folder"),
        ({"output": "o.xyz"}, "suffix"),
        ({"output": "in.fa", "format": "tsv"}, "is also an input"),
        ({"model": "no-such-model"}, "no such checkpoint"),
        ({"device": "tpu9"}, "device 'tpu9'"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"files": []}, "no FASTA file was given"),
    ],
)
def test_bad_options_are_told_before_anything_is_written(tmp_path, model, options, message):
    (tmp_path / "in.fa").write_text(fasta(20))
    if "output" in options:
        options = {**options, "output": tmp_path / options["output"]}
    with pytest.raises(InputError, match=message) as error:
        classify(**{"files": [tmp_path / "in.fa"], "model": model, "device": "cpu", **options})
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["in.fa"]
    assert (tmp_path / "in.fa").read_text() == fasta(20)


def test_a_model_of_something_else_is_refused(tmp_path, make_model):
    (tmp_path / "in.fa").write_text(fasta(20))
    for other in (make_model(tokenizer={"type": "mu_law"}), make_model(head=HeadConfig(task="next_token"))):
        with pytest.raises(InputError, match="not a classifier of DNA"):
            classify([tmp_path / "in.fa"], model=other, device="cpu")


@pytest.mark.parametrize("chunk", [7, 50, 1000])
def test_a_bidirectional_model_gives_a_long_record_the_answer_of_a_single_pass(tmp_path, make_model, chunk):
    folder, lengths = make_model(bidirectional=True), (30, 1000, 40, 101, 100)
    code, rows = run(tmp_path, fasta(*lengths), folder, batch_tokens=100, chunk=chunk)
    assert code == 0
    assert [row["reading"] for row in rows] == ["whole", "two-sweeps", "whole", "two-sweeps", "whole"]
    expected = [expected_logits(folder, bases(i, n)) for i, n in enumerate(lengths)]
    np.testing.assert_allclose(logits_of(rows), expected, atol=2e-5)


def test_where_memory_is_short_a_bidirectional_model_reads_windows_and_says_so(tmp_path, make_model, monkeypatch):
    folder = make_model(bidirectional=True)
    expected = expected_logits(folder, bases(1, 4000))
    needed = 1 + 16 * 8  # bytes per base: the token, and two float32 tensors of width 16
    errors = {}
    for free, options, readings, status in [
        (4000 * needed / 0.75 * 1.1, {}, ["whole", "two-sweeps"], "ok"),
        (4000 * needed / 0.75 * 0.9, {}, ["whole", "windows"], "ok"),
        (1e12, {"reading": "windows"}, ["whole", "windows"], "ok"),
        (1e12, {"reading": "windows", "overlap": 0}, ["whole", "windows"], "ok"),
        (1e5, {"reading": "two-sweeps"}, ["whole", ""], "too_long"),
    ]:
        monkeypatch.setattr(inference, "free_memory", lambda free=free: int(free))
        code, rows = run(tmp_path, fasta(30, 4000), folder, batch_tokens=1000, chunk=100, **options)
        assert [row["reading"] for row in rows] == readings
        assert [row["status"] for row in rows] == ["ok", status]
        if status == "ok":
            errors[free, len(options)] = np.abs(logits_of(rows)[1] - expected).max()
        else:
            assert code == 2
            assert "more than 581 bases, for which two sweeps have memory here" in rows[1]["note"]
    sweeps, windows, asked, bare = errors.values()
    assert sweeps < 2e-5 < windows == asked < bare < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": False, "reading": "windows"}, "reads in one direction, exactly at any length"),
        ({"overlap": 50, "batch_tokens": 100}, "which leaves nothing between"),
        ({"overlap": -1}, "overlap is -1; it must be at least 0"),
        ({"devices": 0}, "devices is 0"),
        ({"devices": 2, "device": "cuda:1"}, "'cuda:1' is no kind of which there are several"),
    ],
)
def test_readings_and_devices_that_cannot_be_are_told(tmp_path, make_model, options, message):
    (tmp_path / "in.fa").write_text(fasta(20))
    folder = make_model(bidirectional=options.pop("bidirectional", True))
    with pytest.raises(InputError, match=message):
        classify([tmp_path / "in.fa"], **{"model": folder, "device": "cpu", **options})


def test_attention_over_the_whole_record_is_read_in_windows(tmp_path, make_model):
    backbone = BackboneConfig(d_model=16, layers=(AttentionConfig(num_heads=2, causal=False, window=4),))
    folder = make_model(backbone=backbone)
    _, rows = run(tmp_path, fasta(500), folder, batch_tokens=100)
    assert rows[0]["reading"] == "windows"
    np.testing.assert_allclose(logits_of(rows)[0], expected_logits(folder, bases(0, 500)), atol=2e-5)
    with pytest.raises(InputError, match="only --reading windows can read it"):
        run(tmp_path, fasta(500), folder, reading="two-sweeps")


def test_bfloat16_gives_nearly_the_same_probabilities(tmp_path, model):
    _, exact = run(tmp_path, fasta(100, 3000), model)
    _, rounded = run(tmp_path, fasta(100, 3000), model, dtype="bfloat16")
    for a, b in zip(exact, rounded, strict=True):
        assert float(a["p_left"]) == pytest.approx(float(b["p_left"]), abs=0.02)


def test_logits_of_a_stream_do_not_depend_on_how_it_is_cut(model):
    classifier = Classifier(model, device="cpu", chunk=64)
    tokens = encode(bases(5, 500).encode())
    expected = classifier.stream([tokens]).logits
    for size in (1, 63, 64, 65, 499):
        found = classifier.stream(tokens[i : i + size] for i in range(0, 500, size)).logits
        np.testing.assert_array_equal(found, expected)


def test_a_stream_fetches_a_chunk_while_the_one_before_is_computed(model, monkeypatch):
    classifier = Classifier(model, device="cpu", chunk=64)
    fetched, read, compute = threading.Semaphore(0), [], classifier.model.read

    def chunks():
        for seed in range(4):
            if seed:
                fetched.release()
            yield encode(bases(seed, 64).encode())

    def reading(ids, state):
        read.append(ids)
        assert len(read) == 4 or fetched.acquire(timeout=200)  # the next one's fetching began before this one's end
        return compute(ids, state)

    monkeypatch.setattr(classifier.model, "read", reading)
    classifier.stream(chunks())
    assert len(read) == 4


MEMORY = """
import resource, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from seqmodels.tasks.genomics import inference
from seqmodels.tasks.genomics.classify import classify
code = classify([Path(sys.argv[1])], model=sys.argv[2], output=Path(sys.argv[3]), device="cpu")
print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def scarce(monkeypatch, tokens):
    """Memory for so many tokens at a time."""
    plain, seen = torch.nn.Embedding.forward, []

    def forward(self, ids):
        if ids.numel() > tokens:
            raise torch.OutOfMemoryError
        seen.append(ids.numel())
        return plain(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    return seen


def test_out_of_memory_batches_and_chunks_are_cut_and_the_rows_are_the_same(tmp_path, model, monkeypatch, capsys):
    text = fasta(40, 50, 60, 45, 1000, 55, 700)
    _, want = run(tmp_path, text, model, batch_tokens=400, chunk=400)
    seen = scarce(monkeypatch, 130)
    code, got = run(tmp_path, text, model, batch_tokens=400, chunk=400)
    assert code == 0
    np.testing.assert_allclose(logits_of(got), logits_of(want), rtol=1e-4, atol=1e-5)
    assert max(seen) <= 130
    errors = capsys.readouterr().err
    assert errors.count("out of memory: batches are read in 2 parts from now on") == 1
    assert errors.count("out of memory: chunks have 100 bases from now on") == 1


def test_a_record_that_does_not_fit_by_itself_is_told_the_way_out(tmp_path, model, monkeypatch):
    scarce(monkeypatch, 130)
    with pytest.raises(InputError, match="a record of 150 bases does not fit into memory; give a --chunk below it"):
        Classifier(model, device="cpu").batch([encode(bases(0, 150).encode())])


def test_five_million_bases_take_less_than_two_gigabytes(tmp_path, make_model):
    folder = make_model(d_model=8, n_layer=1, d_state=4)
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)[np.random.default_rng(0).integers(0, 4, 5_000_000)]
    (tmp_path / "x.fa").write_bytes(b">chromosome\n" + letters.tobytes() + b"\n")
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path / "x.fa"), folder, str(tmp_path / "o.tsv")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    code, megabytes = map(int, done.stdout.split())
    assert code == 0
    assert megabytes < 2000
    assert [(row["length"], row["status"]) for row in rows_of(tmp_path / "o.tsv")] == [("5000000", "ok")]


SLOW = """
import sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
from seqmodels.tasks.genomics import classify
from seqmodels.tasks.genomics.inference import Classifier
fast = Classifier.batch
def slow(self, sequences):
    time.sleep(0.1)
    return fast(self, sequences)
Classifier.batch = slow
classify.classify([Path(sys.argv[1])], model=sys.argv[2], output=Path(sys.argv[3]), device="cpu", batch_tokens=400)
"""


@pytest.fixture
def one_thread():
    """A model so small only loses by a second thread, on busy cores by a factor of ten."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def killed(tmp_path_factory, model):
    """A folder with in.fa (several hundred records), and what a killed process has left of o.tsv."""
    folder = tmp_path_factory.mktemp("killed")
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    lengths[[100, 333]] = 0, 1000  # an empty record, and one that is read in chunks
    (folder / "in.fa").write_text(fasta(*lengths) + ">r7 again\nACGT\n>bad\nAC5\n")
    table, part = folder / "o.tsv", folder / "o.tsv.part"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(folder / "in.fa"), model, str(table)])
    while not part.exists() or part.read_bytes().count(b"\n") < 50:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not table.exists()
    assert 50 <= part.read_bytes().count(b"\n") < 450
    return folder


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_killed_table_resumes_to_the_bytes_of_an_uninterrupted_one(tmp_path, model, killed, suffix, monkeypatch):
    options = {"model": model, "device": "cpu", "batch_tokens": 400}
    files, table = [killed / "in.fa"], tmp_path / f"o.{suffix}"
    classify(files, output=table, **options)
    whole = table.read_bytes()
    assert whole.count(b"\n") == 502 + (suffix != "jsonl")
    left = (killed / "o.tsv.part").read_bytes()
    if suffix == "tsv":
        assert whole.startswith(left[: left.rindex(b"\n") + 1])
    else:
        left = whole[: len(whole) // 3]
    batch, seen = Classifier.batch, []
    monkeypatch.setattr(Classifier, "batch", lambda self, tokens: seen.extend(tokens) or batch(self, tokens))
    ends = left.rindex(b"\n", 0, -9) + 5, len(left), 3  # torn inside a row, as it is, torn inside the header
    for end in ends if suffix == "tsv" else ends[:1]:
        part = tmp_path / f"torn{end}.{suffix}.part"
        part.write_bytes(left[:end])
        shutil.copy(f"{table}.json", f"{part}.json")
        seen.clear()
        assert classify(files, output=part.with_suffix(""), resume=True, **options) == 2  # not all records are ok
        assert part.with_suffix("").read_bytes() == whole
        assert not part.exists()
        assert len(seen) < 500 - left[:end].count(b"\n") + 40  # what was done is not done again, but one flush of it
    assert classify(files, output=part.with_suffix(""), resume=True, **options) == 0  # it is whole


@pytest.mark.usefixtures("one_thread")
def test_what_cannot_be_resumed_is_told_and_kept(tmp_path, model, make_model, killed):
    left = (killed / "o.tsv.part").read_bytes()
    (tmp_path / "o.tsv.part").write_bytes(left)
    shutil.copy(killed / "o.tsv.part.json", tmp_path)
    (tmp_path / "other.fa").write_text(fasta(30, 40))
    other_model = make_model(("left", "middle", "right"))
    otherwise = "o.tsv.part was made otherwise: "
    for file, options, message in [
        (tmp_path / "other.fa", {}, rf"{otherwise}inputs 1 was .*in.fa of .* and is .*other.fa of "),
        (killed / "in.fa", {"model": other_model}, f"{otherwise}model name was .* and is .*, model sha256 model.safe"),
        (killed / "in.fa", {"strand": "rev"}, f"{otherwise}strand was fwd and is rev; repeat that, leave out --resume"),
        (killed / "in.fa", {"dtype": "bfloat16"}, "dtype was float32 and is bfloat16"),
        (killed / "in.fa", {"batch_tokens": None, "chunk": 9}, "batch_tokens was 400 and is 65536, chunk was 16384"),
        (killed / "in.fa", {"window": 9}, "window was None and is 9, stride was None and is 9; repeat"),
        (killed / "in.fa", {"output": tmp_path / "o.parquet"}, "Parquet and .gz are whole or nothing"),
        (killed / "in.fa", {"output": tmp_path / "o.tsv.gz"}, "Parquet and .gz are whole or nothing"),
        (killed / "in.fa", {"output": None}, "cannot be resumed"),
    ]:
        options = {"model": model, "output": tmp_path / "o.tsv", "batch_tokens": 400, **options}
        with pytest.raises(InputError, match=message) as error:
            classify([file], device="cpu", resume=True, **options)
        assert "\n" not in str(error.value)
        assert (tmp_path / "o.tsv.part").read_bytes() == left
    (tmp_path / "o.tsv.part.json").unlink()
    with pytest.raises(InputError, match=r"o.tsv.part.json, which says how .* cannot be read; leave out --resume"):
        classify([killed / "in.fa"], model=model, output=tmp_path / "o.tsv", device="cpu", resume=True)
    with TableWriter(tmp_path / "p.tsv", {"a": str}), pytest.raises(InputError, match="another process is writing"):
        classify([killed / "in.fa"], model=model, output=tmp_path / "p.tsv", device="cpu")


@pytest.mark.usefixtures("one_thread")
def test_what_a_person_stops_is_kept_and_goes_on_to_the_same_table(tmp_path, model, monkeypatch, capsys):
    (tmp_path / "in.fa").write_text(fasta(*[20] * 60))
    options = {"model": model, "device": "cpu", "batch_tokens": 20}
    assert classify([tmp_path / "in.fa"], output=tmp_path / "whole.tsv", **options) == 0
    forward, calls = Classifier.forward, []

    def stopped(self, sequences):
        calls.append(sequences)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return forward(self, sequences)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "forward", stopped)
        with pytest.raises(KeyboardInterrupt):
            classify([tmp_path / "in.fa"], output=tmp_path / "o.tsv", **options)
    assert "the rows so far are in" in capsys.readouterr().err
    assert classify([tmp_path / "in.fa"], output=tmp_path / "o.tsv", resume=True, **options) == 0
    assert (tmp_path / "o.tsv").read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert len(list(tmp_path.glob("o.tsv*"))) == 2  # and its manifest
