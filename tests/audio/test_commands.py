"""The commands of audio, called as the command line calls them."""

import csv
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import seqmodels
from seqmodels.cli import main
from seqmodels.config import ConditionConfig, Mamba2Config
from seqmodels.errors import InputError
from seqmodels.presets import multiscale
from seqmodels.tasks.audio import commands
from seqmodels.tasks.audio.picture import spectrogram
from seqmodels.tasks.audio.train import DataConfig, load_data, model_config, train
from seqmodels.tasks.audio.waveform import MuLaw, read_audio, write_audio

WORDS = ("zero", "one", "seven")
SPEAKERS = ("ann", "theo")


def tone(frequency, samples, rate=8000):
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(samples) / rate)).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny U-Net with random weights."""
    torch.set_num_threads(1)
    conditions = (ConditionConfig(name="digit", values=WORDS), ConditionConfig(name="speaker", values=SPEAKERS))
    backbone = multiscale((16, 16), (1, 1), (4,), outer=Mamba2Config(d_state=8, head_dim=8))
    folder = tmp_path_factory.mktemp("model")
    seqmodels.save(seqmodels.build(model_config(backbone, conditions, MuLaw()), seed=0), folder)
    return str(folder)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Twelve labelled tones with a table; the first four are the test split."""
    folder = tmp_path_factory.mktemp("sounds")
    lines = ["file,word,speaker,split"]
    for i in range(12):
        write_audio(folder / f"{i}.flac", tone(200 + 40 * i, 600 + 50 * i), 8000)
        lines.append(f"{i}.flac,{WORDS[i % 3]},{SPEAKERS[i % 2]},{'test' if i < 4 else 'train'}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def make(checkpoint, tmp_path):
    """`commands.generate` with the tiny model, short, into tmp_path."""

    def run(name="seven.wav", **options):
        options = {"prompt": "seven", "seconds": 0.02} | options
        commands.generate(model=checkpoint, output=tmp_path / name, **options)
        return tmp_path / name

    return run


def test_a_word_becomes_a_sound_with_its_story_and_its_picture(make, checkpoint, tmp_path, capsys):
    path = make(speaker="theo")
    samples, rate = soundfile.read(path)
    assert (rate, len(samples)) == (8000, 160)
    story = json.loads((tmp_path / "seven.json").read_text())
    assert story["labels"] == {"speaker": "theo", "digit": "seven"}
    assert story["arguments"]["seconds"] == 0.02
    assert story["new_samples"] == 160
    assert 7 < story["bits_per_sample"] < 9
    weights = (Path(checkpoint) / "model.safetensors").read_bytes()
    assert story["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert (tmp_path / "seven.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seven.json", "seven.png", "seven.wav"]
    output = capsys.readouterr()
    assert "samples/s" in output.err
    assert output.out == ""


def test_the_same_command_writes_the_same_bytes(make):
    first = make("a.wav").read_bytes()
    assert make("b.wav").read_bytes() == first
    assert make("c.wav", seed=1).read_bytes() != first


def test_several_items_get_numbered_names_and_the_first_is_what_one_would_be(make, tmp_path):
    alone = make("x.flac", picture=False).read_bytes()
    make("x.flac", number=3, picture=False)
    assert (tmp_path / "x_0.flac").read_bytes() == alone
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted(["x.flac", "x.json", *(f"x_{i}.{s}" for i in range(3) for s in ("flac", "json"))])


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_the_suffix_chooses_the_format(make, suffix):
    path = make(f"x{suffix}", picture=False, seconds=0.1)
    assert soundfile.info(path).format == {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}[suffix]
    assert read_audio(path)[1] == 8000


def test_a_recording_is_gone_on_from_at_the_rate_of_the_model(make, tmp_path, capsys):
    stereo = np.stack([tone(300, 4410, 44100)] * 2, axis=1)
    write_audio(tmp_path / "clip.wav", stereo, 44100)
    new = make("new.wav", prompt=str(tmp_path / "clip.wav"), picture=False)
    assert "resampled from 44100 Hz to the model's 8000 Hz" in capsys.readouterr().err
    whole = make("whole.wav", prompt=str(tmp_path / "clip.wav"), include_prompt=True)
    new, whole = soundfile.read(new)[0], soundfile.read(whole)[0]
    assert (len(new), len(whole)) == (160, 800 + 160)
    np.testing.assert_array_equal(whole[800:], new)
    np.testing.assert_allclose(whole[50:750], tone(300, 800)[50:750], atol=0.01)
    full = make("full.wav", prompt=str(tmp_path / "clip.wav"), include_prompt=True, out_rate=44100, picture=False)
    full, recorded = soundfile.read(full)[0], soundfile.read(tmp_path / "clip.wav")[0][:, 0]
    np.testing.assert_array_equal(full[: 4410 - 221], recorded[: 4410 - 221])
    assert json.loads((tmp_path / "whole.json").read_text())["new_sound_starts_at_seconds"] == 0.1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt": "sevn"}, "did you mean 'seven'"),
        ({"prompt": "SEVEN"}, "did you mean 'seven'"),
        ({"prompt": "missing.wav"}, "no such file"),
        ({"speaker": "bob"}, "speaker has no value 'bob'"),
        ({"label": "speaker"}, "expected name=value"),
        ({"label": "speaker=ann,speaker=theo"}, "given twice"),
        ({"label": "mood=glad"}, "no condition 'mood'"),
        ({"name": "x.xyz"}, "unknown suffix"),
        ({"name": "no/folder/x.wav"}, "no folder"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"seconds": 0.0}, "seconds is 0"),
        ({"number": 0}, "number is 0"),
        ({"device": "warp"}, "device 'warp'"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"prompt": None, "guidance": 2.0}, "told nothing to guide by"),
        ({"text": "hello"}, "knows no text"),
        ({"out_rate": 3}, "out-rate is 3 Hz"),
        ({"name": "x.mp3", "out_rate": 9000}, "no sample rate 9000"),
        ({"subtype": "PCM_99"}, "has no subtype 'PCM_99'"),
        ({"stream": True, "number": 2}, "drop --number"),
        ({"stream": True, "normalize": "peak"}, "drop --number, --normalize"),
    ],
)
def test_a_bad_request_is_refused_in_one_line_and_writes_nothing(make, tmp_path, options, reason):
    with pytest.raises(InputError, match=reason) as error:
        make(**options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["empty", "text", "nan", "cut"])
def test_a_bad_recording_as_prompt_is_refused_and_writes_nothing(make, tmp_path, kind):
    path = tmp_path / "clip.wav"
    if kind == "text":
        path.write_text("not a sound\n" * 50)
    elif kind == "cut":
        write_audio(path, tone(300, 4000), 8000)
        path.write_bytes(path.read_bytes()[:5000])
    else:
        soundfile.write(path, tone(300, 0 if kind == "empty" else 99) * np.nan, 8000, subtype="FLOAT")
    with pytest.raises(InputError, match=r"clip\.wav"):
        make("out.wav", prompt=str(path))
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_that_is_not_of_sound_is_refused(tmp_path):
    config = seqmodels.ModelConfig(
        vocab_size=6,
        backbone=multiscale((16, 16), (1, 1), (4,), outer=Mamba2Config(d_state=8, head_dim=8)),
        head=seqmodels.config.HeadConfig(task="next_token"),
        tokenizer={"type": "dna"},
    )
    seqmodels.save(seqmodels.build(config, seed=0), tmp_path / "dna")
    with pytest.raises(InputError, match="not 'mu_law'"):
        commands.generate(model=str(tmp_path / "dna"), output=tmp_path / "x.wav")


def test_a_streamed_file_is_readable_while_it_grows_and_at_last_what_would_be_written_at_once(
    make, tmp_path, monkeypatch
):
    from seqmodels.tasks.audio.waveform import Writer

    write_audio(tmp_path / "clip.wav", tone(300, 2000), 8000)
    options = {"prompt": str(tmp_path / "clip.wav"), "seconds": 0.25, "include_prompt": True, "picture": False}
    expected = make("a.wav", out_rate=16000, **options).read_bytes()
    lengths, write = [], Writer.write

    def watched(writer, samples):
        write(writer, samples)
        lengths.append(len(read_audio(writer.path)[0]))

    monkeypatch.setattr(Writer, "write", watched)
    streamed = make("b.wav", out_rate=16000, stream=True, **options)
    assert streamed.read_bytes() == expected
    assert max(lengths) == soundfile.info(streamed).frames
    assert len(set(lengths)) > 3
    told = [json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab"]
    assert told[0]["bits_per_sample"] == pytest.approx(told[1]["bits_per_sample"])
    for key in ("new_samples", "sample_rate", "new_sound_starts_at_seconds", "ended_by_model"):
        assert told[0][key] == told[1][key]


def test_standard_output_gets_the_samples_alone(checkpoint, make, capfdbinary):
    expected = soundfile.read(make("x.wav", picture=False), dtype="int16")[0]
    capfdbinary.readouterr()
    commands.generate(model=checkpoint, prompt="seven", seconds=0.02, output=Path("-"))
    output = capfdbinary.readouterr()
    np.testing.assert_array_equal(np.frombuffer(output.out, "<i2"), expected)
    assert b"s16le" in output.err


def test_every_recording_of_a_folder_is_gone_on_from_as_if_alone_and_bad_ones_are_told(make, tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name, frequency in (("a", 200), ("b", 500)):
        write_audio(clips / f"{name}.flac", tone(frequency, 900), 8000)
    alone = make("alone.wav", prompt=str(clips / "b.flac"), picture=False).read_bytes()
    (clips / "c.wav").write_text("not a sound")
    assert make("x.wav", prompt=f"{clips}/", picture=False)
    assert "c.wav: cannot be read" in capsys.readouterr().err
    assert (tmp_path / "x_b.wav").read_bytes() == alone
    assert (tmp_path / "x_a.wav").read_bytes() != alone
    assert not (tmp_path / "x_c.wav").exists()
    for path in clips.iterdir():
        path.write_text("not a sound")
    with pytest.raises(InputError, match="none of its 3 recordings"):
        make("y.wav", prompt=f"{clips}/", picture=False)


def test_the_level_asked_for_is_in_the_file_and_clipping_is_told(make, tmp_path, capsys):
    loud = soundfile.read(make("x.flac", normalize="peak", subtype="PCM_24", picture=False))[0]
    assert 20 * np.log10(np.abs(loud).max()) == pytest.approx(-1, abs=0.01)
    assert soundfile.info(tmp_path / "x.flac").subtype == "PCM_24"
    write_audio(tmp_path / "clip.wav", tone(300, 900), 8000)
    capsys.readouterr()
    make("y.wav", normalize="lufs", seconds=0.1, picture=False)
    assert "shorter than 0.4 s" in capsys.readouterr().err
    # what goes on from a float recording twenty times beyond full scale is as loud
    soundfile.write(tmp_path / "loud.wav", 60 * tone(300, 900), 8000, subtype="FLOAT")
    make("z.wav", prompt=str(tmp_path / "loud.wav"), picture=False)
    assert "beyond full scale were clipped; --normalize peak" in capsys.readouterr().err
    assert json.loads((tmp_path / "z.json").read_text())["clipped_samples"] > 0


def test_the_output_is_never_the_prompt(make, tmp_path):
    write_audio(tmp_path / "clip.wav", tone(300, 900), 8000)
    before = (tmp_path / "clip.wav").read_bytes()
    with pytest.raises(InputError, match="is also the prompt"):
        make("clip.wav", prompt=str(tmp_path / "clip.wav"), stream=True)
    assert (tmp_path / "clip.wav").read_bytes() == before


def test_scores_are_the_bits_of_evaluation_and_windows_add_up_to_them(checkpoint, sounds, tmp_path, capsys):
    commands.evaluate(sounds, model=checkpoint, labels=False, split="all", output=tmp_path / "bits.json")
    results = json.loads((tmp_path / "bits.json").read_text())
    capsys.readouterr()
    files = [sounds / f"{i}.flac" for i in range(12)]
    tables = []
    for options in ({}, {"window": 0.03, "chunk": 97}):
        assert commands.score(files, model=checkpoint, output=tmp_path / "t.tsv", **options) == 0
        with (tmp_path / "t.tsv").open() as file:
            tables.append(list(csv.DictReader(file, delimiter="\t")))
    whole, windows = tables
    bits = [float(row["bits_per_sample"]) * int(row["samples"]) for row in whole]
    assert sum(bits) / results["samples"] == pytest.approx(results["bits_per_sample"], abs=1e-4)
    ends = np.mean([float(row["end_bits"]) for row in whole])
    assert ends == pytest.approx(results["end_bits_per_clip"], abs=1e-3)
    for row, total in zip(whole, bits, strict=True):
        parts = [part for part in windows if part["file"] == row["file"]]
        assert sum(float(p["bits_per_sample"]) * int(p["samples"]) for p in parts) == pytest.approx(total, rel=1e-5)
        assert [float(part["start"]) for part in parts] == pytest.approx([0.03 * i for i in range(len(parts))])
        assert float(parts[-1]["end"]) == float(row["end"])


def test_a_recording_that_cannot_be_scored_does_not_stop_the_others(checkpoint, sounds, tmp_path, capsys):
    (tmp_path / "bad.wav").write_text("not a sound")
    arguments = ["audio", "score", str(tmp_path / "bad.wav"), str(sounds / "3.flac"), "--model", checkpoint]
    assert main([*arguments, "--label", "digit=one"]) == 2
    output = capsys.readouterr()
    assert "bad.wav: cannot be read" in output.err
    assert output.out.splitlines()[1].startswith(str(sounds / "3.flac"))
    assert main(["audio", "score", str(tmp_path / "bad.wav"), "--model", checkpoint]) == 2
    assert main([*arguments, "--label", "digit=ten"]) == 2
    assert "digit has no value 'ten'" in capsys.readouterr().err


def test_evaluation_prints_a_table_and_writes_the_same_numbers(checkpoint, sounds, tmp_path, capsys):
    commands.evaluate(sounds, model=checkpoint, output=tmp_path / "bits.json")
    results = json.loads((tmp_path / "bits.json").read_text())
    assert (results["clips"], results["samples"]) == (4, sum(600 + 50 * i for i in range(4)))
    assert results["interval_95"][0] <= results["bits_per_sample"] <= results["interval_95"][1]
    for name, values in (("digit", WORDS), ("speaker", SPEAKERS)):
        group = results["by"][name]
        assert tuple(group) == values
        mean = sum(g["bits_per_sample"] * g["samples"] for g in group.values()) / results["samples"]
        assert mean == pytest.approx(results["bits_per_sample"])
    table = capsys.readouterr().out
    assert f"{results['bits_per_sample']:.3f}" in table
    assert "speaker theo" in table


def test_evaluation_does_not_depend_on_batches(checkpoint, sounds, tmp_path):
    bits = []
    for tokens in (100, 1500, 65536):
        commands.evaluate(sounds, model=checkpoint, split="all", batch_tokens=tokens, output=tmp_path / "bits.json")
        bits.append(json.loads((tmp_path / "bits.json").read_text())["bits_per_sample"])
    assert bits == pytest.approx([bits[0]] * 3, abs=1e-4)


def test_a_context_cuts_recordings_into_pieces_that_know_nothing_of_each_other(checkpoint, sounds, tmp_path):
    found = {}
    for context, tokens in ((0, 65536), (5000, 65536), (300, 65536), (300, 700)):
        commands.evaluate(
            sounds, model=checkpoint, split="all", context=context, batch_tokens=tokens, output=tmp_path / "bits.json"
        )
        result = json.loads((tmp_path / "bits.json").read_text())
        assert result["context"] == context
        found[context, tokens] = (result["bits_per_sample"], result["end_bits_per_clip"], result["samples"])
    assert found[5000, 65536] == pytest.approx(found[0, 65536], abs=1e-4)
    assert found[300, 700] == pytest.approx(found[300, 65536], abs=1e-4)

    assert found[300, 700][0] != pytest.approx(found[0, 65536][0], abs=1e-5)
    assert len({samples for _, _, samples in found.values()}) == 1
    with pytest.raises(InputError, match="context is -1"):
        commands.evaluate(sounds, model=checkpoint, context=-1)


def test_withholding_the_labels_changes_the_bits_but_not_the_groups(checkpoint, sounds, tmp_path):
    commands.evaluate(sounds, model=checkpoint, output=tmp_path / "told.json")
    commands.evaluate(sounds, model=checkpoint, labels=False, output=tmp_path / "untold.json")
    told, untold = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("told", "untold"))
    assert told["bits_per_sample"] != untold["bits_per_sample"]
    assert told["by"]["speaker"].keys() == untold["by"]["speaker"].keys()


def test_the_command_line_takes_the_flags_of_the_readme(checkpoint, sounds, tmp_path, capsys):
    flags = ["--prompt", "seven", "--label", "speaker=theo", "--seconds", "0.02", "-n", "2", "--no-picture"]
    assert main(["audio", "generate", *flags, "--model", checkpoint, "-o", str(tmp_path / "x.wav")]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x_0.json", "x_0.wav", "x_1.json", "x_1.wav"]
    assert json.loads((tmp_path / "x_1.json").read_text())["labels"] == {"speaker": "theo", "digit": "seven"}
    assert main(["audio", "evaluate", str(sounds), "--model", checkpoint, "-o", str(tmp_path / "bits.json")]) == 0
    assert "bits/sample" in capsys.readouterr().out


def test_the_command_line_says_what_is_wrong_in_one_line(checkpoint, tmp_path, capsys):
    flags = ["--prompt", "sevn", "--model", checkpoint, "-o", str(tmp_path / "x.wav")]
    assert main(["audio", "generate", *flags]) == 2
    assert "did you mean 'seven'" in capsys.readouterr().err
    assert main(["audio", "generate", "--prompt", "one", "--model", checkpoint, "--top-p", "much"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"split": "exam"}, "--split is 'exam'"),
        ({"split": "test", "test": ""}, "no recordings"),
        ({"conditions": "digit=split"}, "no value of the condition 'digit'"),
        ({"output": Path("no/such/folder/x.json")}, "no folder"),
        ({"table": Path("nowhere.csv")}, "cannot be read"),
    ],
)
def test_an_evaluation_that_cannot_be_done_is_refused(checkpoint, sounds, options, reason):
    with pytest.raises(InputError, match=reason):
        commands.evaluate(sounds, model=checkpoint, **options)


def test_training_on_a_folder_leads_to_a_model_that_knows_its_labels_and_learns(sounds, tmp_path, capsys):
    flags = "--clips.conditions digit=word,speaker --clips.validation 0.25 --clips.batch-tokens 4096 --dropout 0 "
    flags += "--training.max-steps 30 --training.learning-rate 0.01 --training.validate-every 30 --training.device cpu "
    flags += "--training.ema-decay 0 --widths [16,16] --depths [1,1] --pools [4] --d-state 8 --head-dim 8"
    assert main(["audio", "train", str(sounds), str(tmp_path / "run"), *flags.split()]) == 0
    folder = Path(capsys.readouterr().out.strip())
    model = seqmodels.load(folder)
    assert [condition.name for condition in model.config.conditions] == ["digit", "speaker"]
    assert model.config.conditions[0].values == WORDS
    assert model.config.guidance == 3
    commands.evaluate(sounds, model=str(folder), output=tmp_path / "bits.json")
    assert json.loads((tmp_path / "bits.json").read_text())["bits_per_sample"] < 7.5


TINY = "--training.max-steps 2 --training.validate-every 2 --training.device cpu --training.ema-decay 0 --d-state 8 "
TINY += "--widths [16,16] --depths [1,1] --pools [4] --head-dim 8 --clips.validation 0.25 --clips.batch-tokens 4096 "


def test_a_model_of_text_is_trained_and_told_the_words_of_a_column(sounds, tmp_path, capsys):
    flags = "--clips.text word --outer s4d --centre attention --heads 2 --training.keep both --clips.silence 0.01 "
    flags += "--clips.label-dropout 0"
    assert main(["audio", "train", str(sounds), str(tmp_path / "run"), *(TINY + flags).split()]) == 0
    model = seqmodels.load(capsys.readouterr().out.strip())
    assert (model.config.tokenizer["text"], model.config.vocab_size) == (16, 258 + 256)
    assert model.config.guidance == 1  # it has never done without
    last = seqmodels.load(tmp_path / "run" / "last")
    assert last.config == model.config
    bits = []
    for text in ("word", "speaker", None):
        commands.evaluate(sounds, model=str(tmp_path / "run" / "model"), text=text, output=tmp_path / "bits.json")
        bits.append(json.loads((tmp_path / "bits.json").read_text())["bits_per_sample"])
    assert len(set(bits)) == 3
    with pytest.raises(InputError, match="the column 'mood'"):
        train(sounds, tmp_path / "other", clips=DataConfig(text="mood"))
    table = tmp_path / "silent.csv"
    table.write_text("file,word\n" + "".join(f"{i}.flac,\n" for i in range(12)))
    with pytest.raises(InputError, match="'word', a column without any text"):
        train(sounds, tmp_path / "other", clips=DataConfig(table=table, text="word"))


STILL = "--training.max-steps 1 --training.learning-rate 0 --training.device cpu --training.ema-decay 0 "
STILL += "--clips.validation 0.25 --clips.batch-tokens 4096 --dropout 0 "


def test_labels_keep_their_meaning_whatever_their_order_and_new_ones_are_new(checkpoint, sounds, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text((sounds / "metadata.csv").read_text().replace("one", "four"))
    flags = STILL + f"--clips.table {table} --clips.conditions speaker,digit=word --start-from {checkpoint}"
    assert main(["audio", "train", str(sounds), str(tmp_path / "run"), *flags.split()]) == 0
    start, model = seqmodels.load(checkpoint), seqmodels.load(capsys.readouterr().out.strip())
    assert [c.values for c in model.config.conditions] == [("ann", "theo"), ("zero", "four", "seven")]
    ids = torch.randint(256, (1, 33), generator=torch.Generator().manual_seed(0))
    start, model = start.requires_grad_(False), model.requires_grad_(False)
    for before, now in (((0, 0), (0, 0)), ((2, 1), (1, 2)), ((3, 2), (2, 3))):  # the last: not given
        expected, _ = start(ids, conditions=torch.tensor([before]))
        found, _ = model(ids, conditions=torch.tensor([now]))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    four = model(ids, conditions=torch.tensor([[0, 1]]))[0]
    assert all(not torch.allclose(four, start(ids, conditions=torch.tensor([[i, 0]]))[0]) for i in range(4))


def test_the_first_loss_of_a_model_without_labels_is_that_of_the_start_told_nothing(
    checkpoint, sounds, tmp_path, capsys
):
    flags = (STILL + f"--start-from {checkpoint}").split()
    assert main(["audio", "train", str(sounds), str(tmp_path / "run"), *flags]) == 0
    model, start = seqmodels.load(capsys.readouterr().out.strip()), seqmodels.load(checkpoint)
    data, _, _ = load_data(sounds, DataConfig(validation="0.25", batch_tokens=4096))
    batch = data.train_batch(0)
    torch.testing.assert_close(model.loss(batch)[0], start.loss(batch)[0], rtol=1e-6, atol=0)


def test_what_contradicts_the_model_to_start_from_is_refused_before_anything_is_written(checkpoint, sounds, tmp_path):
    other = seqmodels.load(checkpoint)
    config = dataclasses.replace(other.config, tokenizer={"type": "dna"})
    seqmodels.save(seqmodels.build(config), tmp_path / "dna")
    for options, reason in (
        ({"widths": (16, 16), "head_dim": 8}, "--widths, --head-dim would build other layers"),
        ({"bidirectional": True}, "--bidirectional would build other layers"),
        ({"clips": DataConfig(sample_rate=16000)}, "hears 8000 Hz, not 16000; give --clips.sample-rate 8000"),
        ({"clips": DataConfig(text="word")}, "texts of 5 bytes, and the model to start from reads 0"),
        ({"start_from": str(tmp_path / "dna")}, "not 'mu_law'"),
        ({"start_from": str(tmp_path / "missing")}, "no such checkpoint"),
    ):
        with pytest.raises(InputError, match=reason):
            train(sounds, tmp_path / "run", **{"start_from": checkpoint} | options)
    for options, reason in (
        ({"speeds": 3}, "speeds is 3"),
        ({"noise": 99.0}, "noise is 99"),
        ({"mask": -1}, "mask is"),
        ({"input_noise": -1}, "input_noise is"),
    ):
        with pytest.raises(InputError, match=reason):
            DataConfig(**options)
    assert not (tmp_path / "run").exists()


def test_no_test_or_validation_recording_is_trained_on(sounds):
    data, conditions, _ = load_data(sounds, DataConfig(conditions="digit=word", validation="0.25"))
    assert (len(data.train), len(data.validation)) == (6, 2)
    trained, kept = ({int(n) for n in part.lengths[0]} for part in (data.train, data.validation))
    tested = {600 + 50 * i + 1 for i in range(4)}
    assert len(trained | kept | tested) == 12  # every recording has another length
    assert [condition.name for condition in conditions] == ["digit"]


def test_stage_sizes_that_do_not_fit_together_are_refused_before_anything_is_written(sounds, tmp_path):
    with pytest.raises(InputError, match="do not fit together"):
        train(sounds, tmp_path / "run", widths=(16, 16), depths=(1,), pools=(4,))
    with pytest.raises(InputError, match="head_dim"):
        train(sounds, tmp_path / "run", widths=(20, 20), depths=(1, 1), pools=(4,))
    with pytest.raises(InputError, match="a U-Net is causal"):
        train(sounds, tmp_path / "run", bidirectional=True)
    with pytest.raises(InputError, match="name it with --outer"):
        train(sounds, tmp_path / "run", widths=(20,), depths=(1,), pools=(), centre="mamba")
    with pytest.raises(InputError, match="label_dropout is 2"):
        DataConfig(label_dropout=2.0)
    assert not (tmp_path / "run").exists()


def test_a_spectrogram_shows_a_tone_at_its_frequency():
    levels = spectrogram(tone(1000, 4000))
    assert levels.max() == 0
    assert (levels[20:-20].argmax(axis=1) == 32).all()  # 1000 Hz of 4000 Hz over 129 bins
    assert (spectrogram(np.zeros(500, np.float32)) <= 0).all()


@pytest.mark.data
def test_a_random_model_needs_eight_bits_for_a_spoken_digit(checkpoint, tmp_path):
    digits = Path(os.environ["LONGSEQ_DATA"]) / "audio" / "fsdd"
    table = tmp_path / "two.csv"
    table.write_text("file,word,speaker\n0_theo_0.flac,zero,theo\n7_theo_1.flac,seven,theo\n")
    commands.evaluate(digits, model=checkpoint, table=table, split="all", output=tmp_path / "bits.json")
    results = json.loads((tmp_path / "bits.json").read_text())
    assert results["clips"] == 2
    assert results["bits_per_sample"] == pytest.approx(8, abs=0.5)


SLOW = """
import sys, time
from pathlib import Path
import soundfile
from seqmodels.tasks.audio import commands, waveform
waveform.BLOCK, write = 10, soundfile.SoundFile.write
soundfile.SoundFile.write = lambda file, samples: (time.sleep(0.03), write(file, samples))
commands.generate(prompt="seven", seconds=0.02, number=3, model=sys.argv[1], output=Path(sys.argv[2]), picture=False)
"""


def test_a_kill_while_sound_is_written_leaves_whole_files_only(checkpoint, tmp_path):
    write_audio(tmp_path / "out_1.wav", tone(300, 77), 8000)  # of an earlier run
    process = subprocess.Popen([sys.executable, "-c", SLOW, checkpoint, str(tmp_path / "out.wav")])
    while not list(tmp_path.glob(".out_1.wav.*")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # a few of its sixteen blocks
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["out_0.json", "out_0.wav", "out_1.wav"]
    assert [soundfile.info(tmp_path / f"out_{i}.wav").frames for i in range(2)] == [160, 77]
    assert json.loads((tmp_path / "out_0.json").read_text())["new_samples"] == 160
