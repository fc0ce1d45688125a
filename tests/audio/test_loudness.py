"""Laws of bringing a sound to a level."""

import numpy as np
import pytest

from seqmodels.tasks.audio.loudness import LEVELS, loudness, normalise, rms

NOISE = np.random.default_rng(0).normal(0, 0.02, 8000).astype(np.float32)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_a_full_scale_tone_has_the_loudness_that_the_standard_gives_it(rate):
    tone = np.sin(2 * np.pi * 997 * np.arange(2 * rate) / rate)
    assert loudness(tone, rate) == pytest.approx(-3.01, abs=0.1)  # BS.1770-4, annex 1


def test_each_way_brings_a_sound_to_its_level():
    assert 20 * np.log10(np.abs(normalise(NOISE, 8000, "peak")[0]).max()) == pytest.approx(LEVELS["peak"], abs=1e-3)
    assert 20 * np.log10(rms(normalise(NOISE, 8000, "rms")[0])) == pytest.approx(LEVELS["rms"], abs=1e-3)
    assert loudness(normalise(NOISE, 8000, "lufs")[0], 8000) == pytest.approx(LEVELS["lufs"], abs=1e-2)
    assert normalise(NOISE, 8000, "none")[0] is NOISE


def test_a_sound_too_short_for_loudness_gets_its_rms_level_and_one_is_told():
    short, said = normalise(NOISE[:3000], 8000, "lufs")
    assert "shorter than 0.4 s" in said
    assert 20 * np.log10(rms(short)) == pytest.approx(LEVELS["rms"], abs=1e-3)


@pytest.mark.parametrize("how", ["peak", "rms", "lufs"])
@pytest.mark.parametrize("samples", [0, 5000])
def test_silence_stays_silence(how, samples):
    quiet, said = normalise(np.zeros(samples, np.float32), 8000, how)
    assert not quiet.any()
    assert "silent" in said
