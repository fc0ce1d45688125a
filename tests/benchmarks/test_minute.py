"""benchmarks/minute.py: what it measures of a second of sound, and it trains and runs at a tiny size."""

import sys

import numpy as np
import pytest

from seqmodels.tasks.audio.scores import INSTRUMENTS, play
from seqmodels.tasks.audio.waveform import read_audio, write_audio

RATE = 4000


@pytest.fixture
def program():
    import minute

    return minute


def chord(name, transposed=0.0, seconds=1.0):
    """A held chord, perhaps some semitones higher, by one of the instruments of `audio render`."""
    roll = np.zeros((1, 128), bool)
    roll[0, [48, 55, 64, 72]] = True
    wave = play(roll, INSTRUMENTS[name], seconds, RATE, np.random.default_rng(0))[: round(seconds * RATE)]
    if not transposed:
        return wave
    places = np.arange(len(wave)) * 2 ** (transposed / 12)
    return np.interp(places[places < len(wave) - 1], np.arange(len(wave)), wave)


def test_notes_of_the_scale_are_in_tune_quarter_tones_are_not_and_noise_is_half_so(program):
    noise = np.random.default_rng(0).normal(size=(20, RATE))
    assert program.in_tune(noise, RATE).mean() == pytest.approx(0.5, abs=0.03)
    for name in INSTRUMENTS:
        assert program.in_tune(chord(name), RATE) > 0.85
        assert program.in_tune(chord(name, 0.5), RATE) < 0.2
    assert program.in_tune(np.zeros(RATE), RATE) == 0


def test_the_level_of_a_full_sine_is_3_db_below_full_scale(program):
    sine = np.sin(2 * np.pi * 100 * np.arange(RATE) / RATE)
    np.testing.assert_allclose(program.level(np.stack([sine, 0.1 * sine])), [-3.01, -23.01], atol=0.01)


@pytest.mark.usefixtures("one_thread")
def test_a_row_of_each_instrument_is_measured_second_by_second_and_kept(program, tmp_path, monkeypatch):
    rows, music, lines = [], tmp_path / "music", ["file,split,instrument"]
    music.mkdir()
    for name in ("organ", "piano"):
        for split in ("train", "validation", "test"):
            write_audio(music / f"{name}-{split}.flac", chord(name, seconds=2.2).astype(np.float32), RATE)
            lines.append(f"{name}-{split}.flac,{split},{name}")
    (music / "metadata.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(program.record, "write_rows", lambda name, found: rows.extend(found))
    words = (
        f"{music} {tmp_path / 'run'} --temperatures 1 0.5 --samples {2 * RATE} --rate {RATE} --steps 2 --step 4096 "
        "--longest 2048 --widths 32 32 --depths 1 1 --pools 4 --precision 32 --workers 0 --device cpu"
    )
    monkeypatch.setattr(sys, "argv", ["minute.py", *words.split()])
    program.main()
    warm, cool = (row["each_second"] for row in rows)
    assert set(warm) == {"organ", "piano"}
    for found, temperature in ((warm, "1"), (cool, "0.5")):
        for name, seconds in found.items():
            wave, rate = read_audio(tmp_path / "run" / "made" / f"{name}-{temperature}-1.flac")
            assert (rate, len(wave), len(seconds)) == (RATE, 2 * RATE, 2)
            np.testing.assert_allclose(np.array(seconds)[:, 0], program.level(wave.reshape(2, -1)), atol=0.01)
    assert all(7 < second[1] < 9 for seconds in warm.values() for second in seconds)  # it has hardly learned
    assert {path.name for path in (tmp_path / "run" / "made").glob("*.png")} == {"1-1.png", "0.5-1.png"}
    real = rows[0]["test recordings"]["organ"]
    wave, _ = read_audio(music / "organ-test.flac")
    assert real["in_tune"][1] == pytest.approx(program.in_tune(wave[: 2 * RATE].reshape(2, -1), RATE).mean(), abs=0.01)
    assert len(rows[0]["mib"]) == 2
