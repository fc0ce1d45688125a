"""benchmarks/scaling_law.py: compute is counted as PyTorch counts it, shared out evenly, and spent once."""

import json
import sys

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import seqmodels


@pytest.fixture
def program():
    import scaling_law

    return scaling_law


def test_the_compute_of_attention_is_what_pytorch_counts_with_half_of_the_scores(program):
    l, d = 96, 64
    config = program.language_model("attention", d)
    model = seqmodels.build(config, seed=0)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, l, dtype=torch.long))
    each, parameters = program.operations(config, l)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    scores = sum(program.beside_weights(mixer, d, l) for mixer in config.backbone.layers)
    assert counter.get_total_flops() == l * (2 * (parameters - norms) + 2 * scores)
    assert each == 3 * (2 * parameters + scores)


@pytest.mark.usefixtures("one_thread")
def test_every_mixer_gets_the_same_compute_and_what_is_measured_is_not_trained_again(
    program, tmp_path, monkeypatch, capsys
):
    rng, genomes = np.random.default_rng(0), tmp_path / "genomes"
    genomes.mkdir()
    for name in (program.HELD_OUT, *program.TRAINED_ON):  # told by its first bytes: not compressed
        (genomes / name).write_text(f">{name.split('.')[0]}\n{''.join(rng.choice(list('ACGT'), 2000))}\n")
    monkeypatch.setattr(program.record, "RESULTS", tmp_path / "results")
    words = ["--mixers", "mamba2", "attention", "--widths", "16", "--contexts", "64", "128", "--context-width", "16"]
    words += ["--tokens", "4096", "--step", "256", "--validated", "512", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["scaling_law.py", str(genomes), str(tmp_path / "runs"), *words])
    program.main()
    capsys.readouterr()
    program.main()
    assert capsys.readouterr().out.count(" is in ") == 5
    (path,) = (tmp_path / "results").rglob("*.json")
    counting, *rows = json.loads(path.read_text())
    assert (counting["shape"]["mixer"], counting["bases"]) == ("counting", 8000)
    assert [(row["shape"]["mixer"], row["l"]) for row in rows] == [
        (mixer, l) for l in (64, 128) for mixer in ("mamba2", "attention")
    ]
    for row in rows:
        assert row["bases"] == 256 * row["steps"]
        assert abs(row["petaflop"] - rows[0]["petaflop"]) <= row["petaflop"] / row["steps"]  # to a step
        assert 1.9 < row["bits"] < 5
