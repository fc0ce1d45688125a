"""benchmarks/spoken_digits.py: the protocol for a model of words, and the published one for a model without labels."""

import json
import sys

import numpy as np
import pytest

from seqmodels.cli import main
from seqmodels.tasks.audio.waveform import write_audio

LITTLE = "--training.max-steps 2 --widths [16,16] --head-dim 16 --depths [1,1] --pools [16] --clips.batch-tokens 4096"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Recordings of two words, judges of them, and two models: told the word, and told nothing."""
    folder = tmp_path_factory.mktemp("spoken")
    (folder / "real").mkdir()
    rng, rows = np.random.default_rng(0), ["file,word,split"]
    for i in range(36):
        pitch = (300, 1200)[i % 2] * rng.uniform(0.95, 1.05)
        wave = 0.3 * np.sin(2 * np.pi * pitch * np.arange(rng.integers(500, 900)) / 8000)
        write_audio(folder / "real" / f"{i}.flac", wave.astype(np.float32), 8000)
        rows.append(f"{i}.flac,{('low', 'top')[i % 2]},{'test' if i < 8 else 'validation' if i < 12 else 'train'}")
    (folder / "real" / "metadata.csv").write_text("\n".join(rows) + "\n")
    commands = [
        f"audio judge {folder}/real {folder}/judges --labels word --how.epochs 1 --how.batch 8",
        f"audio train {folder}/real {folder}/told --clips.conditions word --clips.speed-change 0 {LITTLE}",
        f"audio train {folder}/real {folder}/untold --clips.speed-change 0 {LITTLE}",
    ]
    assert [main(command.split()) for command in commands] == [0, 0, 0]
    return folder


@pytest.fixture
def rows_of(trained, monkeypatch):
    """What the program records when it is given a model and options."""
    import spoken_digits

    def run(model, *options):
        kept = {}
        monkeypatch.setattr(spoken_digits, "write_result", lambda name, rows: kept.update({name: rows}))
        monkeypatch.setattr(spoken_digits, "PUBLISHED", (24, 6))
        words = ["program", f"{trained}/{model}/model", f"{trained}/real", f"{trained}/judges"]
        monkeypatch.setattr(sys, "argv", [*words, "--device", "cpu", "--seconds", "0.02", "--batch", "8", *options])
        spoken_digits.main()
        return json.loads(json.dumps(kept["generated_digits"]))

    return run


@pytest.mark.usefixtures("one_thread")
def test_each_seed_and_all_together_are_measured_and_the_bits_told_the_word_and_not(rows_of, trained):
    judges, *clips, over_seeds, told, untold = rows_of("told", "--number", "6", "--seeds", "2")
    assert judges["accuracies"] == json.loads((trained / "judges" / "judges.json").read_text())["held_out"]
    counts = {row["set"]: row["clips"] for row in clips}
    assert counts | {"seed 0": 6, "seed 1": 6, "all seeds": 12} == counts
    assert {"test", "train", "random phases"} <= counts.keys()
    assert {row["rejection"] for row in clips} == {"none"}
    each = [row["word"]["network"]["accuracy"] for row in clips if row["set"].startswith("seed ")]
    assert over_seeds["word network accuracy"]["mean"] == pytest.approx(np.mean(each))
    assert told["bits_per_sample"] != untold["bits_per_sample"]
    assert told["bits_per_sample without one word"].keys() == {"low", "top"}


@pytest.mark.usefixtures("one_thread")
def test_the_published_protocol_is_for_models_without_labels_with_and_without_rejection(rows_of):
    _, *clips, bits = rows_of("untold", "--published")
    counts = {row["set"]: row["clips"] for row in clips}
    without, every, rejected = "6, no rejection", "all, no rejection", "half, of it 0.4 to 0.95 by likelihood"
    assert counts | {without: 6, every: 24, rejected: 7} == counts
    measured = {row["set"]: row for row in clips}
    assert all({"FID", "IS", "mIS", "AM"} <= measured[name].keys() for name in (without, every, rejected, "test"))
    assert "word" not in measured[every]
    assert 0 < bits["bits_per_sample"] < 9
