"""The level of a sound: peak, root mean square, or loudness as heard (ITU-R BS.1770)."""

import numpy as np

LEVELS = {"peak": -1.0, "rms": -18.0, "lufs": -14.0}  # dBFS, dBFS, LUFS: what a sound is brought to
SHORTEST = 0.4  # seconds: loudness is measured in blocks of that length
SILENCE = 1e-5  # root mean square below which there is nothing to bring to a level


def normalise(samples: np.ndarray, rate: int, how: str) -> tuple[np.ndarray, str | None]:
    """Samples (l,) at LEVELS[how] ("none": as they are), and what should be said of it."""
    if how == "none":
        return samples, None
    if rms(samples) < SILENCE:
        return samples, "is silent, so its level is left as it is"
    said = None
    if how == "lufs" and len(samples) < SHORTEST * rate:
        how, said = "rms", f"is shorter than {SHORTEST} s, too short for LUFS; brought to {LEVELS['rms']:g} dBFS RMS"
    level = {"peak": lambda: float(np.abs(samples).max()), "rms": lambda: rms(samples)}.get(how)
    before = loudness(samples, rate) if level is None else 20 * np.log10(level())
    if not np.isfinite(before):
        return samples, "is too quiet for its loudness to be measured, so its level is left as it is"
    return (samples * np.float32(10 ** ((LEVELS[how] - before) / 20))).astype(np.float32), said


def rms(samples: np.ndarray) -> float:
    """Root mean square of samples (l,)."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) if len(samples) else 0.0


def loudness(samples: np.ndarray, rate: int) -> float:
    """Loudness in LUFS of samples (l,), at least SHORTEST seconds of them."""
    import pyloudnorm

    meter = pyloudnorm.Meter(rate, filter_class="DeMan")  # the standard's filters at any rate, within 0.05 LU
    return float(meter.integrated_loudness(samples.astype(np.float64)))
