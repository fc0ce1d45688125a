"""Laws of scores played by simple instruments, and the command `audio render`."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from seqmodels.cli import main
from seqmodels.errors import InputError
from seqmodels.tasks.audio.scores import INSTRUMENTS, REST, play, read_scores
from seqmodels.tasks.audio.tables import open_recordings

CHORD = [[60, 64, 67, -1]] * 4 + [[62, 65, 69, 74]] * 4


def spectrum(wave, rate=16000):
    size = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return np.arange(len(size)) * rate / len(wave), size


@pytest.mark.parametrize("name", INSTRUMENTS)
@pytest.mark.parametrize("pitch", [36, 57, 69, 81])
def test_a_note_sounds_at_its_pitch_and_at_no_pitch_between_its_partials(name, pitch):
    roll = np.zeros((8, 128), bool)
    roll[:, pitch] = True
    wave = play(roll, INSTRUMENTS[name], 0.25, 16000, np.random.default_rng(0))
    frequencies, size = spectrum(wave[: 2 * 16000])
    pitch_in_hz = 440 * 2 ** ((pitch - 69) / 12)
    around = np.abs(frequencies - pitch_in_hz) < 0.2 * pitch_in_hz
    assert frequencies[around][size[around].argmax()] == pytest.approx(pitch_in_hz, rel=0.005, abs=1)
    between = np.abs(frequencies / pitch_in_hz % 1 - 0.5) < 0.1
    assert size[between & (frequencies < 5 * pitch_in_hz)].max() < 0.01 * size.max()
    assert np.abs(wave).max() == pytest.approx(0.9, rel=1e-5)


def test_notes_start_and_end_where_the_score_says_and_rests_are_silent():
    roll = np.zeros((12, 128), bool)
    roll[2:4, 60] = roll[8:10, 67] = True
    wave = play(roll, INSTRUMENTS["organ"], 0.1, 16000, np.random.default_rng(0))
    loud = np.abs(wave[: 12 * 1600]).reshape(12, 1600).max(1)
    assert (loud[[0, 1, 6, 7, 11]] == 0).all()
    assert (loud[[2, 3, 8, 9]] > 0.3).all()


def test_a_held_pitch_is_one_note_and_a_repeated_piece_with_a_gap_two():
    held, gap = np.zeros((6, 128), bool), np.zeros((6, 128), bool)
    held[:, 60] = True
    gap[[0, 1, 3, 4, 5], 60] = True
    waves = [play(roll, INSTRUMENTS["guitar"], 0.2, 16000, np.random.default_rng(0)) for roll in (held, gap)]
    late = [np.abs(wave[3 * 3200 : 4 * 3200]).max() for wave in waves]
    assert late[1] > 1.3 * late[0]  # struck again


def test_every_form_of_a_score_is_the_same_music(tmp_path):
    roll = np.zeros((8, 128), np.uint8)
    for step, voices in enumerate(CHORD):
        roll[step, [pitch for pitch in voices if pitch >= 0]] = 100
    (tmp_path / "a.json").write_text(json.dumps({"train": [CHORD], "valid": [CHORD, CHORD]}))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress((tmp_path / "a.json").read_bytes()))
    np.savez(tmp_path / "a.npz", **{"train/0": roll, "validation/2": np.array(CHORD), "validation/10": roll})
    expected = np.concatenate([roll > 0, np.zeros((REST, 128), bool)])
    for name in ("a.json", "a.json.gz", "a.npz"):
        music = read_scores(tmp_path / name)
        np.testing.assert_array_equal(music["train"], expected)
        np.testing.assert_array_equal(music["validation"], np.concatenate([expected, expected]))
    (tmp_path / "b.json").write_text(json.dumps([CHORD]))
    assert list(read_scores(tmp_path / "b.json")) == ["train"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read as scores"),
        ('{"holdout": [[[60]]]}', "is no split"),
        ('{"train": [[[60.5]]]}', "whole numbers"),
        ('{"train": [[[200]]]}', "up to 127"),
        ('{"train": [[[60], [61, 62]]]}', "no table of numbers"),
        ('{"train": [["C4"]]}', "no table of numbers"),
        ('{"train": []}', "holds no pieces"),
    ],
)
def test_a_bad_score_is_refused_in_one_line(tmp_path, content, reason):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InputError, match=reason) as error:
        read_scores(tmp_path / "bad.json")
    assert "bad.json" in str(error.value)


def test_rendering_makes_recordings_of_equal_length_with_the_split_of_the_score(tmp_path, capsys):
    (tmp_path / "s.json").write_text(json.dumps({"train": [CHORD * 6], "valid": [CHORD * 3], "test": [CHORD * 2]}))
    command = ["audio", "render", str(tmp_path / "s.json")]
    more = ["--seconds", "2", "--sample-rate", "8000", "--tempo", "[60,90]", "--copies", "2"]
    for name in ("a", "b"):
        assert main([*command, str(tmp_path / name), *more]) == 0
    first, second = (open_recordings(tmp_path / name) for name in ("a", "b"))
    assert {row["split"] for row in first.rows.iter_rows(named=True)} == {"train", "validation", "test"}
    assert {row["split"] for row in first.rows.iter_rows(named=True) if "_1_" in row["file"]} == {"train"}
    assert set(first.rows["instrument"]) <= set(INSTRUMENTS)
    waves = first.read(8000)
    assert {len(wave) for wave in waves} == {16000}
    assert len({wave.tobytes() for wave in waves}) == len(waves)
    for wave, again in zip(waves, second.read(8000), strict=True):
        np.testing.assert_array_equal(wave, again)
    capsys.readouterr()
    for words, reason in (
        ([str(tmp_path / "a")], "not empty"),
        ([str(tmp_path / "c"), "--instruments", "kazoo"], "there are piano"),
        ([str(tmp_path / "c"), "--seconds", "900"], "smaller --seconds"),
        ([str(tmp_path / "c"), "--seconds", "-1"], "more than 0"),
        ([str(tmp_path / "c"), "--tempo", "[90,60]"], "out of range"),
    ):
        assert main([*command, *words]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.data
def test_the_chorales_are_what_their_readme_says():
    path = Path(os.environ["LONGSEQ_DATA"]) / "audio" / "jsb_chorales" / "Jsb16thSeparated.json.gz"
    music = read_scores(path)
    steps = {"train": (55228, 229), "validation": (18408, 76), "test": (18900, 77)}
    assert {split: len(roll) for split, roll in music.items()} == {
        split: count + REST * pieces for split, (count, pieces) in steps.items()
    }
    heard = np.flatnonzero(np.concatenate(list(music.values())).any(0))
    assert (heard[0], heard[-1]) == (36, 81)
