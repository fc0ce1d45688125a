"""A picture of a sound: waveform and spectrogram."""

from pathlib import Path

import numpy as np

WINDOW = 256  # samples per spectrum
HOP = 32


def spectrogram(samples: np.ndarray) -> np.ndarray:
    """Levels (frames, WINDOW / 2 + 1) in dB below the loudest one, floor -80, of samples (l,); Hann windows."""
    padded = np.pad(samples.astype(np.float64), WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW))) ** 2
    return 10 * np.log10(
        np.maximum(power, 1e-8 * max(power.max(initial=0.0), 1e-12)) / max(power.max(initial=0), 1e-12)
    )


def draw_picture(path: Path, samples: np.ndarray, sample_rate: int, title: str, start: float = 0.0) -> None:
    """Write a PNG of samples (l,): amplitude and spectrogram over seconds; `start` marks where new sound begins."""
    from matplotlib.figure import Figure  # no pyplot: needs no display and keeps no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    wave, spectrum = figure.subplots(2, 1, sharex=True)
    seconds = len(samples) / sample_rate
    wave.plot(np.arange(len(samples)) / sample_rate, samples, linewidth=0.5)
    wave.set(title=title, ylabel="amplitude", xlim=(0, max(seconds, 1 / sample_rate)), ylim=(-1, 1))
    levels = spectrogram(samples).T
    extent = (0, seconds, 0, sample_rate / 2)
    image = spectrum.imshow(levels, origin="lower", aspect="auto", extent=extent, vmin=-80, vmax=0, cmap="magma")
    spectrum.set(xlabel="time (s)", ylabel="frequency (Hz)")
    figure.colorbar(image, ax=spectrum, label="level (dB)")
    if start:
        for axes in (wave, spectrum):
            axes.axvline(start, color="tab:red", linewidth=1)
    figure.savefig(path, format="png", dpi=120)
