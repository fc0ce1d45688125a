import json
import os

import numpy as np
import pytest
import torch

import seqmodels
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.classify import classify
from seqmodels.tasks.genomics.evaluate import evaluate
from seqmodels.tasks.genomics.metrics import evaluate_scores
from seqmodels.tasks.genomics.tokens import encode

LENGTHS = (30, 400, 77, 120, 60, 250)
LABELS = ("left", "right", "right", "left", "right", "left")


def bases(seed, length):
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length))


@pytest.fixture
def sequences():
    return [bases(i, n) for i, n in enumerate(LENGTHS)]


@pytest.fixture
def expected(model, sequences):
    """Metrics of single passes, one sequence at a time."""
    network = seqmodels.load(model)
    with torch.inference_mode():
        logits = [network(torch.from_numpy(encode(s.encode()).astype(np.int64))[None])[0].numpy() for s in sequences]
    targets = np.array([("left", "right").index(label) for label in LABELS])
    return evaluate_scores(targets, torch.from_numpy(np.array(logits)).double().softmax(1).numpy(), resamples=50)


def result(path):
    report = json.loads(path.read_text())
    return report["results"]


def same_values(found, expected):
    found, expected = dict(found), dict(expected)
    assert found.pop("window") is None
    assert (found["n"], found["confusion"]) == (expected["n"], expected["confusion"])
    for name, values in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(values)
    return True


@pytest.mark.parametrize("kind", ["csv", "fasta", "predictions.tsv", "predictions.jsonl", "predictions.parquet"])
def test_every_kind_of_input_gives_the_metrics_of_single_passes(tmp_path, model, sequences, expected, kind, capsys):
    names = [f"r{i}" for i in range(len(LENGTHS))]
    (tmp_path / "x.fa").write_text("".join(f">{n} text\n{s}\n" for n, s in zip(names, sequences, strict=True)))
    rows = "".join(f"{n}\t{label}\n" for n, label in zip(names, LABELS, strict=True))
    (tmp_path / "labels.tsv").write_text("record\tlabel\n" + rows)
    rows = "".join(f"{s},{label}\n" for s, label in zip(sequences, LABELS, strict=True))
    (tmp_path / "x.csv").write_text("sequence,label\n" + rows)
    arguments = {"resamples": 50, "output": tmp_path / "o.json", "device": "cpu", "chunk": 100}
    if kind == "csv":
        evaluate(model, tmp_path / "x.csv", **arguments)
    elif kind == "fasta":
        evaluate(model, tmp_path / "x.fa", tmp_path / "labels.tsv", **arguments)
    else:
        classify([tmp_path / "x.fa"], model=model, output=tmp_path / kind, device="cpu")
        evaluate(str(tmp_path / kind), labels=tmp_path / "labels.tsv", **arguments)
    (found,) = result(tmp_path / "o.json")
    assert same_values(found, expected)
    shown = capsys.readouterr().out
    assert f"{expected['metrics']['accuracy']['value']:.3f}" in shown
    assert "95 % interval" in shown


def long_records(folder, model_labels=("left", "right")):
    """Two test records, and a training record that must not be looked at."""
    (folder / "x.fa").write_text(f">a\n{bases(0, 900)}\n>b\n{bases(1, 700)}\n>c\nACGT\n")
    rows = zip("abc", (*model_labels, "unknown"), ("test", "test", "train"), strict=True)
    lines = [f"x.fa,{record},{label},{split}" for record, label, split in rows]
    (folder / "metadata.csv").write_text("file,record,label,split\n" + "\n".join(lines) + "\n")
    return folder


def test_windows_of_every_length_are_balanced(tmp_path, model):
    output = tmp_path / "o.json"
    evaluate(model, long_records(tmp_path), window="50,200", windows=4, resamples=10, output=output, device="cpu")
    assert [(r["window"], r["n"], [sum(row) for row in r["confusion"]]) for r in result(output)] == [
        (50, 8, [4, 4]), (200, 6, [3, 3])
    ]  # fmt: skip
    evaluate(model, tmp_path, window="200", windows=4, overlap=True, resamples=0, output=output, device="cpu")
    assert result(output)[0]["n"] == 8
    assert "low" not in result(output)[0]["metrics"]["mcc"]
    evaluate(model, tmp_path, output=output, device="cpu")
    assert (result(output)[0]["window"], result(output)[0]["n"]) == (None, 2)


def test_windows_in_chunks_give_the_same_metrics(tmp_path, model):
    reports = []
    for chunk in (1000, 64):
        evaluate(model, long_records(tmp_path), window="150", output=tmp_path / "o.json", device="cpu", chunk=chunk)
        reports.append(result(tmp_path / "o.json"))
    assert reports[0] == reports[1]


def test_rows_without_a_prediction_are_left_out(tmp_path, model, capsys):
    (tmp_path / "x.fa").write_text(f">a\n{bases(0, 50)}\n>b\nNNN\n>c\n{bases(1, 50)}\n")
    (tmp_path / "labels.tsv").write_text("record\tlabel\na\tleft\nb\tleft\nc\tright\n")
    classify([tmp_path / "x.fa"], model=model, output=tmp_path / "p.tsv", device="cpu")
    evaluate(str(tmp_path / "p.tsv"), labels=tmp_path / "labels.tsv", output=tmp_path / "o.json")
    assert result(tmp_path / "o.json")[0]["n"] == 2
    assert "1 rows without a prediction" in capsys.readouterr().err


PREDICTIONS = "record_id\tlabel\tp_left\tp_right\na\tleft\t0.7\t0.3\n"


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {"source": "MODEL"}, "name labelled data with --data"),
        ({}, {"source": "p.tsv"}, "name the table of labels with --labels"),
        ({"l.tsv": "record\tlabel\n"}, {"source": "p.tsv", "labels": "l.tsv"}, "p.tsv does not exist"),
        ({"p.tsv": PREDICTIONS, "l.tsv": "record\tlabel\nb\tleft\n"}, {"source": "p.tsv", "labels": "l.tsv"},
         "no label for record 'a'"),
        ({"p.tsv": PREDICTIONS, "l.tsv": "record\tlabel\na\tup\n"}, {"source": "p.tsv", "labels": "l.tsv"},
         "label 'up' is not a class of"),
        ({"p.tsv": "a\tb\n1\t2\n", "l.tsv": "record\tlabel\na\tup\n"}, {"source": "p.tsv", "labels": "l.tsv"},
         "lacks the columns record_id"),
        ({"p.tsv": PREDICTIONS.replace("0.7", "x"), "l.tsv": "record\tlabel\na\tleft\n"},
         {"source": "p.tsv", "labels": "l.tsv"}, "a score is no number"),
        ({"p.parquet": "no", "l.tsv": "record\tlabel\na\tleft\n"}, {"source": "p.parquet", "labels": "l.tsv"},
         "cannot read"),
        ({"x.csv": "sequence,label\nACGT,up\n"}, {"source": "MODEL", "data": "x.csv"},
         "label 'up' of row_2 is not a class of the model (left, right)"),
        ({"x.csv": "sequence,label\nACGT,left\n"}, {"source": "MODEL", "data": "x.csv", "window": "10"},
         "leave --window out"),
        ({"x.csv": "sequence,label\nACGT,left\n"}, {"source": "MODEL", "data": "x.csv", "output": "no/o.json"},
         "cannot write"),
        ({}, {"source": "MODEL", "data": "LONG", "window": "5000"}, "class 'left' has no record of 5000 bases"),
        ({}, {"source": "MODEL", "data": "LONG", "split": "dev"}, "no records of the split 'dev'"),
        ({}, {"source": "MODEL", "data": "LONG", "windows": 0}, "windows is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_line_and_leaves_no_output(tmp_path, model, files, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    before = set(os.listdir(tmp_path))
    if options.get("data") == "LONG":
        (tmp_path / "long").mkdir()
        options = {**options, "data": long_records(tmp_path / "long")}
        before |= {"long"}
    paths = {k: tmp_path / v for k, v in options.items() if k in ("data", "labels", "output")}
    source = model if options["source"] == "MODEL" else options["source"]
    with pytest.raises(InputError) as error:
        evaluate(**{"output": tmp_path / "o.json", "device": "cpu", **options, **paths, "source": source})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert set(os.listdir(tmp_path)) == before
