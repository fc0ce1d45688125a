import json
import os
import subprocess
import sys

import numpy as np
import pytest

from seqmodels.cli import main

RECORDS = ">a one\n" + "ACGTTGCA" * 10 + "\n>b two\n" + "GGATC" * 9 + "\n"


def test_classify_and_evaluate_work_as_commands(tmp_path, model, capsys):
    (tmp_path / "x.fa").write_text(RECORDS)
    (tmp_path / "y.fa").write_text(RECORDS)
    (tmp_path / "l.tsv").write_text("record\tlabel\na\tleft\nb\tright\n")
    files = [str(tmp_path / "x.fa"), str(tmp_path / "y.fa")]
    table, report = str(tmp_path / "o.tsv"), str(tmp_path / "o.json")
    assert main(["dna", "classify", *files, "--model", model, "-o", table, "--device", "cpu", "--chunk", "50"]) == 0
    assert main(["dna", "evaluate", table, "--labels", str(tmp_path / "l.tsv"), "-o", report]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["results"][0]["n"] == 4
    assert "balanced_accuracy" in capsys.readouterr().out


def test_train_works_as_a_command(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["".join(rng.choice(list("ACGT"), 30)) + f",{i % 2}" for i in range(20)]
    (tmp_path / "x.csv").write_text("sequence,label\n" + "\n".join(rows) + "\n")
    words = "--window 20,30 --batch-tokens 120 --no-reverse-complement --d-model 32 --n-layer 1 --d-state 8"
    steps = "--training.max-steps 2 --training.validate-every 1 --training.device cpu"
    assert main(["dna", "train", str(tmp_path / "x.csv"), str(tmp_path / "run"), *words.split(), *steps.split()]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("missing.fa", None), ("empty.fa", b""), ("binary.fa", bytes(range(256))), ("text.fa", b"hello\n")],
)
def test_a_bad_file_is_one_line_and_exit_code_2(tmp_path, model, capsys, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = os.listdir(tmp_path)
    assert main(["dna", "classify", str(tmp_path / name), "--model", model, "-o", str(tmp_path / "o.tsv")]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert name in told.err
    assert os.listdir(tmp_path) == before


def test_standard_input_and_output_work_in_a_real_process(model):
    command = [sys.executable, "-m", "seqmodels", "dna", "classify", "-", "--model", model, "--device", "cpu"]
    done = subprocess.run(command, input=RECORDS + ">c\n\n", capture_output=True, text=True, check=False)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == ["record_id", "a", "b", "c"]
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "longseq: standard input: 1 of 3 records are not ok (1 empty); see the columns status and note"
    ]


def test_a_command_starts_without_pytorchs_compiler_whose_import_takes_seconds(tmp_path):
    (tmp_path / "x.fa").write_text(RECORDS)
    words = ["dna", "classify", str(tmp_path / "x.fa"), "-o", str(tmp_path / "o.tsv"), "--device", "cpu"]
    code = f"import sys; from seqmodels.cli import main; main({words}); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
