"""Noise mixed into recordings, for classifiers that are to hear through it."""

import numpy as np


def add_noise(wave: np.ndarray, ratio: float, rng: np.random.Generator, slope: float = 0.0) -> np.ndarray:
    """A clip with noise at a signal-to-noise ratio in dB, whose power falls as frequency**-slope (0: white)."""
    noise = rng.standard_normal(len(wave))
    if slope:
        spectrum = np.fft.rfft(noise)
        noise = np.fft.irfft(spectrum * np.arange(1, len(spectrum) + 1) ** (-slope / 2), len(wave))
    power = np.mean(np.square(wave)) / np.mean(np.square(noise)) * 10 ** (-ratio / 10)
    return (wave + np.sqrt(power) * noise).astype(np.float32)


def roughened(wave: np.ndarray, ratios: tuple[float, float], share: float, rng: np.random.Generator) -> np.ndarray:
    """With probability `share` the clip with noise at a ratio of that range in dB, else itself.

    A third of the noise slopes towards low frequencies, as that of rooms and engines does; the rest is white.
    """
    slope = rng.uniform(0, 2) if rng.random() < 1 / 3 else 0.0
    return add_noise(wave, rng.uniform(*ratios), rng, slope) if rng.random() < share else wave
