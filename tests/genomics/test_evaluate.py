import json
import os

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve

import seqmodels
from seqmodels.errors import InputError
from seqmodels.metrics import evaluate_any, evaluate_scores
from seqmodels.tasks.genomics import pictures
from seqmodels.tasks.genomics.classify import classify
from seqmodels.tasks.genomics.evaluate import evaluate
from seqmodels.tasks.genomics.inference import Classifier
from seqmodels.tasks.genomics.pictures import draw
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


def same_values(found, expected, **budget):
    found, expected = dict(found), dict(expected)
    assert found.pop("window") == expected.get("window")
    assert (found["n"], found["confusion"]) == (expected["n"], expected["confusion"])
    for name, values in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(values, **budget)
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
    assert same_values(found, expected, **({"rel": 1e-5} if kind.startswith("p") else {}))  # six digits of a table
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


def test_an_evaluation_stopped_anywhere_goes_on_to_the_same_bytes(tmp_path, model, monkeypatch, capsys):
    long_records(tmp_path)
    options = {"window": "50,200", "windows": 4, "resamples": 10, "device": "cpu", "chunk": 64}

    def run(name, **more):
        options_ = {**options, "output": tmp_path / f"{name}.json", "predictions": tmp_path / f"{name}.tsv", **more}
        assert evaluate(model, tmp_path, **options_) == 0
        return [(tmp_path / f"{name}{suffix}").read_bytes() for suffix in (".json", ".tsv")]

    whole, calls = run("whole"), []
    batch, stream = Classifier.batch, Classifier.stream  # of 50 bases at once, of 200 one by one

    def stopping(function, after):
        def stopped(self, given):
            calls.append(given)
            if len(calls) == after:
                raise KeyboardInterrupt
            return function(self, given)

        return stopped

    def patched(patch, after):
        calls.clear()
        patch.setattr(Classifier, "batch", stopping(batch, after))
        patch.setattr(Classifier, "stream", stopping(stream, after))

    for after in (1, 2, 7):
        with monkeypatch.context() as patch:
            patched(patch, after)
            with pytest.raises(KeyboardInterrupt):
                run(after)
            assert not (tmp_path / f"{after}.json").exists()
            patched(patch, 0)
            assert run(after, resume=True) == whole
        assert len(calls) == 8 - after  # what has been read is not read again
        assert not list(tmp_path.glob("*logits*"))
    with monkeypatch.context() as patch:
        patched(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run("other")
    with pytest.raises(InputError, match="windows was 4 and is 3"):
        run("other", resume=True, windows=3)
    assert evaluate(model, tmp_path, **options, output=tmp_path / "7.json", resume=True) == 0
    assert "nothing to resume" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"7.json was made otherwise: seed was 0 and is 1; repeat that"):
        evaluate(model, tmp_path, **options | {"seed": 1}, output=tmp_path / "7.json", resume=True)
    for more in ({}, {"annotation": [tmp_path / "x.bed"], "output": tmp_path / "o.json"}):
        with pytest.raises(InputError, match="without --annotation, and with --output or --predictions"):
            evaluate(model, tmp_path, **options, **more, resume=True)


def test_windows_in_chunks_give_the_same_metrics(tmp_path, model):
    reports = []
    for chunk in (1000, 64):
        evaluate(model, long_records(tmp_path), window="150", output=tmp_path / "o.json", device="cpu", chunk=chunk)
        reports += result(tmp_path / "o.json")
    assert same_values(reports[1], reports[0], rel=1e-5)


def test_rows_without_a_prediction_are_left_out(tmp_path, model, capsys):
    (tmp_path / "x.fa").write_text(f">a\n{bases(0, 50)}\n>b\nNNN\n>c\n{bases(1, 50)}\n")
    (tmp_path / "labels.tsv").write_text("record\tlabel\na\tleft\nb\tleft\nc\tright\n")
    classify([tmp_path / "x.fa"], model=model, output=tmp_path / "p.tsv", device="cpu")
    evaluate(str(tmp_path / "p.tsv"), labels=tmp_path / "labels.tsv", output=tmp_path / "o.json")
    assert result(tmp_path / "o.json")[0]["n"] == 2
    assert "1 rows without a prediction" in capsys.readouterr().err


def test_predictions_of_windows_say_where_they_are_and_give_the_same_metrics_again(tmp_path, model):
    folder, output, table = long_records(tmp_path), tmp_path / "o.json", tmp_path / "p.tsv"
    evaluate(model, folder, window="200", windows=3, resamples=5, output=output, predictions=table, device="cpu")
    (first,) = result(output)
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    assert rows[0] == ["record_id", "start", "end", "window", "true", "label", "prob", "p_left", "p_right"]
    assert len(rows) == 7
    network, sequences = seqmodels.load(model), {"a": bases(0, 900), "b": bases(1, 700)}
    for record, start, end, window, true, label, prob, *scores in rows[1:]:
        assert (true, window, int(end) - int(start)) == ({"a": "left", "b": "right"}[record], "200", 200)
        ids = torch.from_numpy(encode(sequences[record][int(start) : int(end)].encode()).astype(np.int64))[None]
        with torch.inference_mode():
            expected = network(ids).double().softmax(1)[0].tolist()
        assert [float(score) for score in scores] == pytest.approx(expected, rel=1e-5)
        assert (label, float(prob)) == (("left", "right")[int(np.argmax(expected))], max(map(float, scores)))
    evaluate(str(table), resamples=5, output=output)
    (again,) = result(output)
    assert same_values(again, {**first, "window": None}, rel=1e-5)


@pytest.mark.parametrize("kind", ["multi", "regression"])
def test_tables_of_several_labels_and_of_numbers_are_evaluated_as_such(tmp_path, kind):
    rng = np.random.default_rng(0)
    scores = rng.random((40, 2)).round(3)
    true = (rng.random((40, 2)) < scores) if kind == "multi" else scores + rng.normal(size=(40, 2)).round(3)
    start = "p" if kind == "multi" else "value"
    lines = [f"record_id\t{start}_x\t{start}_y", *(f"r{i}\t{a}\t{b}" for i, (a, b) in enumerate(scores))]
    (tmp_path / "p.tsv").write_text("\n".join(lines) + "\n")
    cells = [[str(float(value)) for value in row] for row in true]
    cells[0][0] = ""  # not known
    (tmp_path / "l.csv").write_text(
        "record,label_y,label_x\n" + "".join(f"r{i},{y},{x}\n" for i, (x, y) in enumerate(cells))
    )
    known = true.astype(float)
    known[0, 0] = np.nan
    options = {"resamples": 20, "output": tmp_path / "o.json"}
    evaluate(str(tmp_path / "p.tsv"), labels=tmp_path / "l.csv", predictions=tmp_path / "again.csv", **options)
    (found,) = result(tmp_path / "o.json")
    expected = evaluate_any(kind, known, scores, resamples=20)
    for name, values in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(values, nan_ok=True)
    evaluate(str(tmp_path / "again.csv"), **options)
    assert result(tmp_path / "o.json") == [found]


def test_pictures_are_drawn_of_every_kind_and_length(tmp_path, model):
    pictures = tmp_path / "pictures"
    options = {"windows": 4, "resamples": 0, "device": "cpu", "pictures": pictures, "picture_format": "svg"}
    evaluate(model, long_records(tmp_path), window="50,200", **options)
    names = {"roc.svg", "precision-recall.svg", "calibration.svg", "confusion.svg"}
    assert {path.name for path in pictures.iterdir()} == {"window-50", "window-200"}
    assert {path.name for path in (pictures / "window-200").iterdir()} == names
    rng = np.random.default_rng(0)
    for kind, targets, expected in (
        ("multi", np.array([[0, 1.0], [1, np.nan], [1, 0]]), names - {"confusion.svg"}),  # y is known of two
        ("multi", np.ones((3, 2)), set()),  # nothing to tell apart
        ("regression", rng.random((3, 2)), {"scatter.svg"}),
    ):
        folder = tmp_path / f"{kind}{len(expected)}"
        draw(folder, kind, ("x", "y"), targets, rng.random((3, 2)), "three", "svg")
        assert {path.name for path in folder.iterdir()} == expected


def test_curves_have_the_areas_of_the_table_in_their_legend_and_confusion_the_counts(monkeypatch):
    targets = np.array([0, 0, 1, 1, 2, 2, 0, 1])
    scores = np.random.default_rng(1).dirichlet(np.ones(3), 8)
    metrics = evaluate_scores(targets, scores, resamples=0)
    drawn = {}
    monkeypatch.setattr(pictures, "_write", lambda folder, makers, *_: drawn.update(makers))
    draw("folder", "single", ("x", "y", "z"), targets, scores, "eight")
    for picture, name, short in (("roc", "auroc", "AUC"), ("precision-recall", "auprc", "AP")):
        drawn[picture](figure := Figure())
        told = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        areas = [own[name]["value"] for own in metrics["per_class"]]
        assert told == [f"{c} ({short} = {area:.2f})" for c, area in zip("xyz", areas, strict=True)]
    drawn["calibration"](figure := Figure())
    curve = figure.axes[0].get_lines()[1]
    part, said = calibration_curve(targets == 0, scores[:, 0], n_bins=10)
    np.testing.assert_allclose(curve.get_xydata(), np.stack([said, part], 1))
    drawn["confusion"](figure := Figure())
    counts, parts = ([float(text.get_text()) for text in axes.texts] for axes in figure.axes)
    confusion = np.array(metrics["confusion"])
    assert counts == confusion.ravel().tolist()
    assert parts == pytest.approx((confusion / confusion.sum(1, keepdims=True)).ravel(), abs=0.005)


PREDICTIONS = "record_id\tlabel\tp_left\tp_right\na\tleft\t0.7\t0.3\n"


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {"source": "MODEL"}, "name labelled data with --data"),
        ({"p.tsv": PREDICTIONS}, {"source": "p.tsv"}, "name the table of labels with --labels"),
        ({"l.tsv": "record\tlabel\n"}, {"source": "p.tsv", "labels": "l.tsv"}, "p.tsv does not exist"),
        ({"p.tsv": PREDICTIONS, "l.tsv": "record\tlabel\nb\tleft\n"}, {"source": "p.tsv", "labels": "l.tsv"},
         "no label for record 'a'"),
        ({"p.tsv": PREDICTIONS, "l.tsv": "record\tlabel\na\tup\n"}, {"source": "p.tsv", "labels": "l.tsv"},
         "label 'up' of a is not a class of"),
        ({"p.tsv": "a\tb\n1\t2\n", "l.tsv": "record\tlabel\na\tup\n"}, {"source": "p.tsv", "labels": "l.tsv"},
         "lacks the columns record_id"),
        ({"p.tsv": PREDICTIONS.replace("0.7", "x"), "l.tsv": "record\tlabel\na\tleft\n"},
         {"source": "p.tsv", "labels": "l.tsv"}, "a score is no number"),
        ({"p.tsv": PREDICTIONS.replace("0.7", "1.2"), "l.tsv": "record\tlabel\na\tleft\n"},
         {"source": "p.tsv", "labels": "l.tsv"}, "a column p_<class> has what is no probability"),
        ({"p.parquet": "no", "l.tsv": "record\tlabel\na\tleft\n"}, {"source": "p.parquet", "labels": "l.tsv"},
         "cannot read"),
        ({"x.csv": "sequence,label\nACGT,up\n"}, {"source": "MODEL", "data": "x.csv"},
         "label 'up' of row_2 is not a class of the model (left, right)"),
        ({"x.csv": "sequence,label\nACGT,left\n"}, {"source": "MODEL", "data": "x.csv", "window": "10"},
         "leave --window out"),
        *(({"x.csv": "sequence,label\nACGT,left\n"}, {"source": "MODEL", "data": "x.csv", name: "no/o.tsv"},
           "cannot write") for name in ("output", "predictions")),
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
    paths = {k: tmp_path / v for k, v in options.items() if k in ("data", "labels", "output", "predictions")}
    source = model if options["source"] == "MODEL" else options["source"]
    with pytest.raises(InputError) as error:
        evaluate(**{"output": tmp_path / "o.json", "device": "cpu", **options, **paths, "source": source})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert set(os.listdir(tmp_path)) == before
