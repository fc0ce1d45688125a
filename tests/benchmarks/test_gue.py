"""benchmarks/gue.py: a row per task and their mean, also where all tasks are learned together before."""

import json
import sys

import numpy as np
import pytest


@pytest.mark.usefixtures("one_thread")
def test_each_task_starts_from_a_model_of_all_and_what_is_measured_is_not_trained_again(tmp_path, monkeypatch, capsys):
    import gue

    rng, data, run = np.random.default_rng(0), tmp_path / "gue", tmp_path / "run"
    for task in ("one/a", "b"):
        (data / task).mkdir(parents=True)
        for split, n in (("train", 20), ("dev", 8), ("test", 8)):
            rows = ["".join(rng.choice(list("ACGT"), 40)) + f",{i % 2}" for i in range(n)]
            (data / task / f"{split}.csv").write_text("\n".join(["sequence,label", *rows]) + "\n")
    monkeypatch.setattr(gue.record, "RESULTS", tmp_path / "results")
    steps = "--training.max-steps 2 --training.validate-every 1 --training.device cpu"
    words = f"{data} {run} --name tiny -- --seeds 2 {steps} -- --d-model 32 --n-layer 1 --d-state 4 {steps}"
    monkeypatch.setattr(sys, "argv", ["gue.py", *words.split()])
    gue.measure()
    assert capsys.readouterr().err.count("step 2/2") == 1 + 2 * 2
    record = json.loads((tmp_path / "results" / "tiny.json").read_text())
    assert record["command"].endswith(words)
    *rows, mean = record["rows"]
    assert [(row["task"], row["models"], row["records"]) for row in rows] == [
        (task, 2, {"dev": 8, "test": 8}) for task in ("b", "one/a")
    ]
    assert mean["test_mcc"] == pytest.approx(sum(row["test_mcc"] for row in rows) / 2)
    started = json.loads(next((run / "b").rglob("run.json")).read_text())
    assert started["start_from"] == str(run / "joint" / "model")
    assert started["model"]["backbone"]["d_model"] == 32
    gue.measure()
    assert "step" not in capsys.readouterr().err
