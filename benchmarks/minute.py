"""Does music stay music? A model of rendered scores goes on for a minute of 16 kHz in one run, for each instrument.

    longseq audio render shared/data/audio/jsb_chorales/Jsb16thSeparated.json.gz music --workers 16 --copies 2
    python benchmarks/minute.py music RUN [--temperatures 1 0.9] [--input-noise 3]

The model, told the instrument, is trained unless RUN/model is there. Then 960,000 samples follow one another, a row of
the batch for each instrument, the end barred, once for each temperature; RUN/made keeps them, with a picture. Of every
second and row: level in dBFS; the mean of -log2 p of the samples drawn, whose expectation at temperature 1 is the
entropy of what the model predicts; and the part of the energy from 100 to 1,000 Hz that lies within a quarter of a
semitone of a note of the tempered scale, to which the scores are tuned, where noise has half. Quantiles of the same of
the test recordings stand beside them, and the memory in use at each second. Rows go to results/GPU/minute.json.
"""

import argparse
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from generate import draw, sampler_of
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.signal import spectrogram

import seqmodels
from seqmodels.checkpoint import choose_device
from seqmodels.sampling import Sampling
from seqmodels.tasks.audio.evaluate import score_recording
from seqmodels.tasks.audio.tables import open_recordings
from seqmodels.tasks.audio.train import DataConfig, train
from seqmodels.tasks.audio.waveform import mu_law_of, peak_normalise, write_audio
from seqmodels.training import TrainingConfig

LABEL = "instrument"
COLUMNS = ("dbfs", "bits", "in_tune")
SPREAD = (0.05, 0.5, 0.95)
CHUNK = 1 << 18  # samples of a recording that a model reads at a time


def level(waves: NDArray[np.floating]) -> NDArray[np.float64]:
    """dBFS of waves (..., l)."""
    return 10 * np.log10(np.maximum(np.square(waves, dtype=np.float64).mean(-1), 1e-12))


def in_tune(waves: NDArray[np.floating], rate: int) -> NDArray[np.float64]:
    """Part of the energy of waves (..., l), from 100 to 1,000 Hz, at most 25 cents off the scale; silence has none."""
    power = np.square(np.abs(np.fft.rfft(waves * np.hanning(waves.shape[-1]))))
    frequency = np.fft.rfftfreq(waves.shape[-1], 1 / rate)
    heard = (frequency >= 100) & (frequency <= 1000)
    pitch = 12 * np.log2(frequency[heard] / 440)
    energy = power[..., heard].sum(-1)
    return power[..., heard][..., np.abs(pitch - pitch.round()) < 0.25].sum(-1) / np.where(energy > 0, energy, np.inf)


def memory_mib(device: torch.device) -> float:
    """Most memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def of_recordings(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What the seconds of the test recordings have: bits per sample, and quantiles of every column by instrument."""
    rate, seconds = mu_law_of(model.config.tokenizer).sample_rate, {}
    recordings = open_recordings(options.music)
    rows = recordings.rows.with_row_index().filter(recordings.rows["split"] == "test")
    for row in rows.iter_rows(named=True):
        (wave,) = recordings.select(np.array([row["index"]])).read(rate)
        wave, _ = peak_normalise(wave)
        heard = score_recording(model, options.music / row["file"], {LABEL: row[LABEL]}, window=1.0, chunk=CHUNK)
        wave = wave[: len(wave) // rate * rate].reshape(-1, rate)
        bits = [one["bits_per_sample"] for one in heard[: len(wave)]]
        seconds.setdefault(row[LABEL], []).append(np.stack([level(wave), bits, in_tune(wave, rate)]))
    spread = {
        label: {
            name: np.quantile(values, SPREAD).round(4).tolist()
            for name, values in zip(COLUMNS, np.concatenate(found, 1), strict=True)
        }
        for label, found in sorted(seconds.items())
    }
    every = np.concatenate([one for found in seconds.values() for one in found], 1)
    return {"test bits per sample": round(float(every[1].mean()), 4), "test recordings": spread}


def draw_all(path: Path, names: Sequence[str], waves: NDArray[np.floating], rate: int) -> None:
    """Spectrograms of all rows (rows, seconds, rate), as far up as voices go."""
    figure = Figure(figsize=(12, 1.5 * len(names)), layout="constrained")
    places = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, name, wave in zip(places, names, waves, strict=True):
        frequency, seconds, power = spectrogram(wave.ravel(), rate, "hann", 2048, 1024)
        levels, extent = 10 * np.log10(power + 1e-11), (0, seconds[-1], 0, frequency[-1])
        axes.imshow(levels, origin="lower", aspect="auto", extent=extent, vmin=-110, vmax=-20, cmap="magma")
        axes.set(ylim=(0, min(1500, rate / 2)), ylabel=f"{name}\nHz")
    places[-1].set(xlabel="seconds")
    figure.savefig(path, format="png", dpi=100)


def one_run(model: Any, temperature: float, options: argparse.Namespace) -> dict[str, Any]:
    """One run of all rows, second by second."""
    mu_law = mu_law_of(model.config.tokenizer)
    (instrument,) = model.config.conditions
    names, made = instrument.values, options.run / "made"
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sampling = Sampling(temperature=temperature, top_p=options.top_p, guidance=1.0)
    sampler = sampler_of(model, [{LABEL: name} for name in names], sampling, options.seed)
    tokens, bits, mib = [], [], []
    begun = time.perf_counter()
    for second in range(math.ceil(options.samples / mu_law.sample_rate)):
        drawn, nats = draw(sampler, mu_law.sample_rate)
        tokens.append(drawn)
        bits.append(-nats.mean(1, dtype=np.float64) / math.log(2))
        mib.append(round(memory_mib(model.device), 1))
        print(f"{second + 1:4} s  {level(mu_law.decode(drawn)).round(1)} dBFS  {bits[-1].round(2)} bits", flush=True)
    took = time.perf_counter() - begun
    waves = mu_law.decode(np.stack(tokens, 1))  # (rows, seconds, rate)
    made.mkdir(exist_ok=True)
    how = f"{temperature:g}-{options.top_p:g}"
    for name, wave in zip(names, waves, strict=True):
        write_audio(made / f"{name}-{how}.flac", wave.ravel(), mu_law.sample_rate)
    draw_all(made / f"{how}.png", names, waves, mu_law.sample_rate)
    each = np.stack([level(waves), np.stack(bits, 1), in_tune(waves, mu_law.sample_rate)], -1).round(4).tolist()
    return {
        "op": "minute", "l": waves[0].size, "dtype": "float32", "pass": "long run",
        "shape": {
            "model": str(options.run / "model"), "b": len(names), "temperature": temperature, "top_p": options.top_p
        },
        "samples_per_s": round(waves.size / took), "columns": COLUMNS, "mib": mib,
        "each_second": dict(zip(names, each, strict=True)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("music", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--temperatures", type=float, nargs="+", default=(1.0,))
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=960_000, help="of each row")
    parser.add_argument("--steps", type=int, default=12_500, help="of training")
    parser.add_argument("--step", type=int, default=131_072, help="samples per step")
    parser.add_argument("--longest", type=int, default=61_440, help="samples of a piece of a recording")
    parser.add_argument("--input-noise", type=float, default=3.0, help="levels of mu-law")
    parser.add_argument("--rate", type=int, default=16000)
    parser.add_argument("--widths", type=int, nargs="+", default=(128, 192, 256))
    parser.add_argument("--depths", type=int, nargs="+", default=(4, 4, 5))
    parser.add_argument("--pools", type=int, nargs="+", default=(4, 4))
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--precision", choices=("32", "bf16"), default="bf16")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="of these sources, where they are no git checkout")
    options = parser.parse_args()
    if not (options.run / "model").is_dir():
        train(
            options.music, options.run,
            clips=DataConfig(
                conditions=LABEL, sample_rate=options.rate, batch_tokens=options.step, longest=options.longest,
                speed_change=0, input_noise=options.input_noise, label_dropout=0.0, seed=options.seed,
            ),
            training=TrainingConfig(
                max_steps=options.steps, learning_rate=options.learning_rate, precision=options.precision,
                ema_decay=0.999, validate_every=max(1, options.steps // 4), num_workers=options.workers,
                weights="bfloat16", seed=options.seed, device=options.device,
            ),
            widths=tuple(options.widths), depths=tuple(options.depths), pools=tuple(options.pools), dropout=0.0,
        )  # fmt: skip
    model = seqmodels.load(str(options.run / "model"), device=choose_device(options.device))
    about = record.origin(options.commit) | {"seed": options.seed, "threads": torch.get_num_threads()}
    rows = [one_run(model, temperature, options) for temperature in options.temperatures]
    real = of_recordings(model, options)
    print(f"{real['test bits per sample']} bits per sample of test recordings")
    print(record.write_rows("minute", [row | real | about for row in rows]))


if __name__ == "__main__":
    main()
