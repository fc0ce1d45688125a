"""Laws of the judges of generated speech, and the commands `audio judge` and `audio metrics`."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from seqmodels.cli import main
from seqmodels.errors import InputError
from seqmodels.tasks.audio.judges import (
    Ear,
    Judge,
    JudgeConfig,
    Network,
    SupportVectors,
    load_judges,
    train_network,
    train_support_vectors,
)
from seqmodels.tasks.audio.measure import Sounds, kept, mean_and_spread
from seqmodels.tasks.audio.noise import add_noise
from seqmodels.tasks.audio.tables import open_recordings, split_rows
from seqmodels.tasks.audio.waveform import write_audio

WORDS, SPEAKERS = ("low", "mid", "top"), ("ann", "bob")
CONFIG = JudgeConfig(epochs=4, batch=16, learning_rate=1e-2)


def utterance(word, speaker, rng, rate=8000):
    """A tone whose pitch is the word and whose tremolo is the speaker."""
    t = np.arange(rng.integers(1200, 2400)) / rate
    wave = np.sin(2 * np.pi * (300, 900, 2500)[word] * rng.uniform(0.95, 1.05) * t + rng.uniform(0, 6))
    return (0.3 * wave * (1 + 0.9 * np.sin(2 * np.pi * (8, 40)[speaker] * t))).astype(np.float32)


def utterances(count, seed):
    rng = np.random.default_rng(seed)
    words, speakers = rng.integers(0, 3, count), rng.integers(0, 2, count)
    return [utterance(w, s, rng) for w, s in zip(words, speakers, strict=True)], words, speakers


@pytest.fixture(scope="module")
def judge():
    torch.set_num_threads(1)
    waves, words, _ = utterances(64, 0)
    network = train_network(waves, words, 3, CONFIG)
    return Judge(CONFIG, WORDS, network, train_support_vectors(waves, words, CONFIG))


def test_a_judge_knows_what_it_has_not_heard_also_in_noise(judge):
    waves, words, _ = utterances(60, 1)
    rng = np.random.default_rng(0)
    for heard in (judge.hear(waves), judge.hear([add_noise(wave, 5, rng) for wave in waves])):
        assert (heard.first == words).mean() > 0.95
        assert (heard.second == words).mean() > 0.95


def test_what_a_judge_hears_does_not_depend_on_neighbours_order_or_level(judge):
    waves, _, _ = utterances(9, 2)
    together = judge.hear(waves)
    for i, wave in enumerate(waves):
        alone = judge.hear([wave / 7])
        np.testing.assert_allclose(alone.log_p[0], together.log_p[i], atol=1e-3)
        np.testing.assert_allclose(alone.features[0], together.features[i], atol=1e-3)
        assert alone.second[0] == together.second[i]
    np.testing.assert_allclose(np.exp(together.log_p).sum(1), 1)


@pytest.mark.usefixtures("one_thread")
def test_the_same_seed_trains_the_same_judge_whatever_was_drawn_before():
    waves, words, _ = utterances(20, 0)
    config = JudgeConfig(epochs=1, batch=10)
    first = train_network(waves, words, 3, config).state_dict()
    torch.rand(3)
    for name, tensor in train_network(waves, words, 3, config).state_dict().items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 5])
def test_stored_support_vectors_say_what_scikit_learn_says(classes):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (200, 6))
    height = x[:, 0] + x[:, 1] ** 2
    y = (height > np.quantile(height, np.linspace(0, 1, classes + 1)[1:-1])[:, None]).sum(0)
    machine = SVC(C=10, gamma=1 / 6).fit(x, y)
    stored = SupportVectors.of(machine, np.zeros(6), np.ones(6))
    fresh = rng.normal(0, 1, (500, 6))
    assert (stored.classify(fresh) == machine.predict(fresh)).mean() > 0.995  # votes may be tied


@pytest.mark.parametrize("slope", [0.0, 1.5])
def test_noise_is_added_at_the_ratio_that_is_asked_for(slope):
    wave = np.sin(np.arange(4000) / 9).astype(np.float32)
    noise = add_noise(wave, 7, np.random.default_rng(0), slope).astype(float) - wave
    assert 10 * np.log10(np.square(wave).mean() / np.square(noise).mean()) == pytest.approx(7, abs=0.01)
    low, high = np.split(np.square(np.abs(np.fft.rfft(noise)))[:2000], 2)
    assert (low.mean() / high.mean() > 2) == (slope > 0)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_a_tone_is_loudest_in_the_band_of_its_pitch(rate):
    from torchaudio.functional import melscale_fbanks

    config = JudgeConfig(sample_rate=rate)
    ear = Ear(config)
    bands, lengths = ear([np.sin(2 * np.pi * 1000 * np.arange(rate // 2) / rate).astype(np.float32)])
    assert lengths.tolist() == [51]
    n_fft = {8000: 256, 16000: 512}[rate]
    bank = melscale_fbanks(n_fft // 2 + 1, 50.0, rate / 2, 40, rate)
    assert int(bands[0, :, 10:40].mean(1).argmax()) == int(bank[round(1000 * n_fft / rate)].argmax())


def test_rejection_keeps_the_middle_of_the_likelihoods():
    bits = np.random.default_rng(0).permutation(100) / 10.0
    clips = Sounds([np.zeros(1, np.float32)] * 100, {"word": np.arange(100)}, bits)
    rest = kept(clips, (0.4, 0.95))
    assert sorted(rest.bits) == sorted(bits)[5:60]  # the likeliest 5 % have the fewest bits
    np.testing.assert_array_equal(bits[rest.truth["word"]], rest.bits)
    with pytest.raises(InputError, match="bits_per_sample"):
        kept(Sounds(clips.waves, {}), (0.4, 0.95))
    with pytest.raises(InputError, match="generate more"):
        kept(clips.select(np.arange(2)), (0.4, 0.95))


def test_the_spread_over_seeds_is_the_sample_deviation():
    results = [{"a": {"b": value}} for value in (1.0, 2.0, 4.0)]
    assert mean_and_spread(results, ["a", "b"]) == pytest.approx(
        {"mean": 7 / 3, "std": np.sqrt(7 / 3), "min": 1, "max": 4}
    )


def recordings(folder, count, seed, **columns):
    folder.mkdir()
    waves, words, speakers = utterances(count, seed)
    lines = ["file,word,speaker" + "".join(f",{name}" for name in columns)]
    for i, wave in enumerate(waves):
        write_audio(folder / f"{i}.flac", wave, 8000)
        cells = [f"{i}.flac", WORDS[words[i]], SPEAKERS[speakers[i]], *(str(value(i)) for value in columns.values())]
        lines.append(",".join(cells))
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.usefixtures("one_thread")
def test_judges_are_trained_saved_and_asked_about_generated_recordings(tmp_path, capsys):
    real = recordings(
        tmp_path / "real", 90, 3, split=lambda i: "test" if i < 24 else "validation" if i < 30 else "train"
    )
    words = ["--how.epochs", "3", "--how.batch", "16", "--how.learning-rate", "0.01"]
    assert main(["audio", "judge", str(real), str(tmp_path / "judges"), *words]) == 0
    assert "svm" in capsys.readouterr().out
    facts = json.loads((tmp_path / "judges" / "judges.json").read_text())
    assert facts["classes"] == {
        "word": sorted(WORDS, key=facts["classes"]["word"].index),
        "speaker": facts["classes"]["speaker"],
    }
    assert facts["train"] == 60
    assert {(row["label"], row["judge"], row["split"]) for row in facts["held_out"]} == {
        (label, judge, split)
        for label in ("word", "speaker") for judge in ("network", "svm") for split in ("validation", "test")
    }  # fmt: skip
    made = recordings(tmp_path / "made", 40, 4, bits_per_sample=lambda i: 4 + i / 40, ended=lambda i: i % 4 > 0)
    output = tmp_path / "metrics.json"
    command = ["audio", "metrics", str(made), str(real), "--judges", str(tmp_path / "judges")]
    assert main([*command, "-o", str(output), "--reject", "[0.4,0.95]"]) == 0
    assert "random phases" in capsys.readouterr().out
    results = json.loads(output.read_text())
    sets = results["sets"]
    clips = {"generated": 40, "after rejection": 22, "test": 24, "train": 60}
    assert {name: found["clips"] for name, found in sets.items()} == clips | dict.fromkeys(
        ("random phases", "backwards", "white noise"), 24
    )
    assert sets["generated"]["word"]["network"]["accuracy"] > 0.9
    assert sets["generated"]["ended by the model"] == 0.75
    assert sets["train"]["FID"] == pytest.approx(0, abs=1e-9)
    assert 0 < sets["test"]["FID"] < sets["white noise"]["FID"]
    assert np.sum(sets["generated"]["word"]["confusion"]["svm"]) == 40
    assert sets["generated"]["copies from training"]["copied"] == 0
    judges = load_judges(tmp_path / "judges")
    assert judges["word"].classes == tuple(facts["classes"]["word"])

    (made / "metadata.csv").write_text("file\n0.flac\n1.flac\n2.flac\n")  # generated without labels: no accuracies
    assert main([*command, "-o", str(output)]) == 0
    assert json.loads(output.read_text())["sets"]["generated"].keys() >= {"FID", "IS", "mIS", "AM", "seconds"}
    assert "word" not in json.loads(output.read_text())["sets"]["generated"]
    for more, reason in (
        (["--reject", "[0.9,0.1]"], "two fractions"),
        (["--reject", "[0.4,0.95]"], "bits_per_sample"),
        (["-o", str(tmp_path / "no" / "x.json")], "create it first"),
    ):
        assert main([*command, *more]) == 2
        assert reason in capsys.readouterr().err
    (made / "metadata.csv").write_text("file\n0.flac\n")
    assert main(command) == 2
    assert "two or more" in capsys.readouterr().err
    for folder, labels, reason in (
        ("judges", "word", "judges already"),
        ("other", "mood", "--labels names the column"),
    ):
        assert main(["audio", "judge", str(real), str(tmp_path / folder), "--labels", labels]) == 2
        assert reason in capsys.readouterr().err
    (tmp_path / "judges" / "judges.json").write_text("{}")
    assert main(command) == 2
    assert "longseq audio judge" in capsys.readouterr().err


@pytest.mark.data
@pytest.mark.usefixtures("one_thread")
def test_support_vectors_recognise_spoken_digits_of_unheard_takes():
    found = open_recordings(Path(os.environ["LONGSEQ_DATA"]) / "audio" / "fsdd")
    parts = split_rows(found.rows, test="index=0,1", validation="index=2-41")
    waves = {name: found.select(parts[name]).read(8000) for name in ("train", "test")}
    truth = {name: found.select(parts[name]).rows["digit"].cast(int).to_numpy() for name in waves}
    config = JudgeConfig()
    second = train_support_vectors(waves["train"], truth["train"], config)
    heard = Judge(config, tuple("0123456789"), Network(config.bands, 10), second).hear(waves["test"])
    assert (heard.second == truth["test"]).mean() > 0.85
