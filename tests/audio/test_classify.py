"""Classifiers of raw samples: trained, evaluated and used from the command line, whatever reads the samples."""

import csv
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import seqmodels
from seqmodels.cli import main
from seqmodels.config import ConditionConfig, S4DConfig
from seqmodels.errors import InputError
from seqmodels.presets import mamba2, multiscale
from seqmodels.tasks.audio import commands
from seqmodels.tasks.audio.classify import _windows, classify, probabilities
from seqmodels.tasks.audio.datasets import lay_out
from seqmodels.tasks.audio.train import DataConfig, load_data, model_config
from seqmodels.tasks.audio.waveform import MuLaw, write_audio

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ("low", "high")
BACKBONES = {
    "u-net": multiscale((16, 16), (1, 1), (4,), outer=S4DConfig(d_state=8)),
    "both-ways": mamba2(16, 1, bidirectional=True, d_state=8, head_dim=8),
}


def tone(frequency, samples, rate=8000):
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(samples) / rate)).astype(np.float32)


def table_of(path):
    return list(csv.DictReader(path.read_text().splitlines(), delimiter="\t"))


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Sixteen tones, low and high in turn, the last without a label; the first six are the test split."""
    folder = tmp_path_factory.mktemp("sounds")
    lines = ["file,word,split"]
    for i in range(17):
        write_audio(folder / f"{i}.flac", tone(2000 if i % 2 else 150, 500 + 20 * i), 8000)
        lines.append(f"{i}.flac,{WORDS[i % 2] if i < 16 else ''},{'test' if i < 6 else 'train'}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def saved(name, folder):
    condition = ConditionConfig(name="word", values=WORDS)
    config = model_config(BACKBONES[name], (condition,), MuLaw(), classify=True)
    seqmodels.save(seqmodels.build(config, seed=0), folder)
    return str(folder)


def test_training_leads_to_a_classifier_that_tells_low_from_high(sounds, tmp_path, capsys):
    flags = "--classify word --outer s4d --widths [16] --depths [1] --pools [] --bidirectional --d-state 8 --dropout 0 "
    flags += "--clips.validation 0.25 --clips.batch-tokens 4096 --training.max-steps 30 --training.learning-rate 0.02 "
    flags += "--training.validate-every 30 --training.device cpu --training.ema-decay 0"
    assert main(["audio", "train", str(sounds), str(tmp_path / "run"), *flags.split()]) == 0
    model = capsys.readouterr().out.strip()
    assert seqmodels.load(model).config.head.labels == WORDS
    commands.evaluate(sounds, model=model, output=tmp_path / "accuracy.json")
    results = json.loads((tmp_path / "accuracy.json").read_text())
    assert (results["n"], results["metrics"]["accuracy"]["value"]) == (6, 1.0)
    assert results["confusion"] == [[3, 0], [0, 3]]
    assert "accuracy" in capsys.readouterr().out
    assert main(["audio", "classify", str(sounds), "--model", model, "-o", str(tmp_path / "table.tsv")]) == 0
    rows = {Path(row["file"]).stem: row["label"] for row in table_of(tmp_path / "table.tsv")}
    assert len(rows) == 17
    assert rows["3"] == "high"
    assert rows["4"] == "low"


def test_recordings_without_a_label_are_not_trained_on(sounds):
    data, (word,), _ = load_data(sounds, DataConfig(validation="0.2"), "word")
    assert word.values == WORDS
    assert len(data.train) + len(data.validation) == 10
    for classified, options, reason in (
        ("file,word", {}, "expected one column"),
        ("word", {"text": "word"}, "told nothing"),
        ("mood", {}, "the column 'mood'"),
    ):
        with pytest.raises(InputError, match=reason):
            load_data(sounds, DataConfig(**options), classified)


def test_a_classifier_starts_with_what_a_generating_model_hears(sounds, tmp_path, capsys):
    told = (ConditionConfig(name="word", values=WORDS), ConditionConfig(name="speaker", values=("ann", "theo")))
    for name in BACKBONES | {"flat": mamba2(16, 1, d_state=8, head_dim=8)}:
        if name == "both-ways":  # which generates nothing
            continue
        backbone = BACKBONES.get(name) or mamba2(16, 1, d_state=8, head_dim=8)
        start = seqmodels.build(model_config(backbone, told, MuLaw()), seed=3).eval()
        seqmodels.save(start, tmp_path / name)
        flags = f"--classify word --start-from {tmp_path / name} --clips.validation 0.25 --training.max-steps 1 "
        flags += "--training.learning-rate 0 --training.device cpu --training.ema-decay 0 --clips.batch-tokens 4096"
        assert main(["audio", "train", str(sounds), str(tmp_path / f"run-{name}"), *flags.split()]) == 0
        model = seqmodels.load(capsys.readouterr().out.strip()).eval()
        assert (model.config.conditions, model.config.head.labels) == ((), WORDS)
        ids = torch.randint(256, (2, 37), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, _ = start.backbone(ids)  # told nothing
            found, _ = model.backbone(ids)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BACKBONES)
def test_probabilities_do_not_depend_on_batches_chunks_or_neighbours(name, tmp_path):
    model = seqmodels.load(saved(name, tmp_path / "model")).double()
    waves = [tone(300 + 50 * i, 301 + 700 * i) for i in range(4)]
    want = [torch.softmax(model(torch.tensor([[256, *MuLaw().tokens(w, 8000)[0]]])), -1)[0] for w in waves]
    for batch_tokens in (500, 1500, 65536):
        found = probabilities(model, lay_out(waves, MuLaw()), batch_tokens=batch_tokens)
        np.testing.assert_allclose(found, torch.stack(want).detach(), rtol=1e-9)


def test_each_recording_of_folders_and_archives_has_a_row_and_a_bad_one_says_why(tmp_path, capsys):
    model = saved("u-net", tmp_path / "model")
    folder = tmp_path / "in"
    folder.mkdir()
    write_audio(folder / "a.wav", tone(300, 8000, 16000), 16000)
    write_audio(folder / "c.wav", np.zeros(4000, np.float32), 8000)
    (folder / "b.wav").write_text("not a sound")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(folder / "a.wav", "deep/a.wav")
    files = [folder, tmp_path / "more.zip", tmp_path / "none.wav", folder / "a.wav"]
    assert classify(files, model=model, output=tmp_path / "t.tsv") == 2
    rows = table_of(tmp_path / "t.tsv")
    assert [Path(row["file"]).name for row in rows] == ["a.wav", "b.wav", "c.wav", "a.wav", "none.wav", "a.wav"]
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok", "error", "ok"]
    assert rows[2]["note"] == "silence"
    assert "cannot be read as sound" in rows[1]["note"]
    assert rows[0]["p_low"] == rows[3]["p_low"] == rows[5]["p_low"]
    assert float(rows[0]["p_low"]) + float(rows[0]["p_high"]) == pytest.approx(1, abs=1e-5)
    assert (rows[0]["start"], rows[0]["end"]) == ("0", "0.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "no such file" in lines[1]


def test_windows_cover_a_recording_and_say_where_they_are(tmp_path):
    assert list(_windows(10, 0.4, None, 10)) == [(0, 4), (4, 8), (8, 10)]
    assert list(_windows(8, 0.4, 0.2, 10)) == [(0, 4), (2, 6), (4, 8)]
    assert list(_windows(3, 0.4, 0.2, 10)) == [(0, 3)]
    assert list(_windows(6, 0.2, 0.6, 10)) == [(0, 2)]  # with gaps between
    assert list(_windows(7, 0.2, 0.6, 10)) == [(0, 2), (6, 7)]
    model = saved("u-net", tmp_path / "model")
    write_audio(tmp_path / "a.wav", tone(300, 2000), 8000)
    assert classify([tmp_path / "a.wav"], model=model, window=0.1, output=tmp_path / "t.tsv") == 0
    rows = table_of(tmp_path / "t.tsv")
    assert [(row["start"], row["end"]) for row in rows] == [("0", "0.1"), ("0.1", "0.2"), ("0.2", "0.25")]


def test_what_cannot_be_classified_is_refused_in_one_line(tmp_path):
    for options, reason in (
        ({}, "no model is named"),
        ({"stride": 1.0}, "give --window too"),
        ({"window": 0.0}, "window is 0"),
        ({"model": "spoken-digits"}, "is no classifier of sound"),
        ({"model": "enterobacteria"}, "not 'mu_law'"),
    ):
        with pytest.raises(InputError, match=reason):
            classify([tmp_path], **options)
