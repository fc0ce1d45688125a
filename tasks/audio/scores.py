"""`longseq audio render`: scores played by simple instruments, as long recordings whose music is known exactly.

A score is a table of steps: at each step the MIDI pitch of every voice (69 is A of 440 Hz; below 0 is a rest), or a
piano roll, a column for each of the 128 pitches. A pitch that stays from one step to the next is held. A note is a sum
of partials, each with its own decay (a struck or plucked string, a pipe, a bowed string), so that it sounds exactly at
its pitch.
"""

import gzip
import itertools
import json
import math
import sys
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from seqmodels.errors import InputError
from seqmodels.files import make_folder, replacing
from seqmodels.tasks.audio.layouts import natural
from seqmodels.tasks.audio.waveform import check_writable, write_audio

SPLITS = {"train": "train", "valid": "validation", "validation": "validation", "dev": "validation", "test": "test"}
PARTIALS = 24
REST = 8  # steps of silence after a piece


@dataclass(frozen=True)
class Instrument:
    """The partials of a note: amplitude of partial k is k**-slope, and it decays with (slow + fast * k) per second."""

    slope: float
    slow: float = 0.0
    fast: float = 0.0
    odd: float = 1.0
    "Part of the amplitude that the even partials have: below 1 a stopped pipe or a reed."
    attack: float = 0.005
    "Seconds until it is loud."
    release: float = 0.06
    "Seconds from its end until it is silent."
    stiffness: float = 0.0
    "How far partial k is above k times the pitch: k * sqrt(1 + stiffness * k^2), as of a piano's strings."
    vibrato: float = 0.0
    "Depth of a vibrato of 5.5 Hz, as a part of the pitch."


INSTRUMENTS = {
    "piano": Instrument(1.6, slow=1.2, fast=0.7, stiffness=2e-4, release=0.12),
    "guitar": Instrument(1.2, slow=1.0, fast=1.6, release=0.08),
    "harpsichord": Instrument(0.7, slow=1.5, fast=0.5, attack=0.002),
    "organ": Instrument(1.1, attack=0.03, release=0.08),
    "clarinet": Instrument(1.0, odd=0.15, attack=0.04),
    "strings": Instrument(1.0, attack=0.09, release=0.15, vibrato=0.003),
}


def render(
    scores: Path,
    folder: Path,
    *,
    seconds: float = 60.0,
    sample_rate: int = 16000,
    instruments: str = ",".join(INSTRUMENTS),
    tempo: tuple[float, float] = (60.0, 100.0),
    steps_per_beat: int = 4,
    copies: int = 1,
    seed: int = 0,
    workers: int = 1,
    quiet: bool = False,
) -> None:
    """Play scores by simple instruments: recordings of equal length for `audio train`, with metadata.csv.

    The pieces of each split are played one after another and cut into recordings; each recording has one instrument
    and one tempo, drawn by the seed, so that what was heard long ago helps. The end of a split that fills no recording
    is left out.

    Args:
        scores: .json, .json.gz or .npz of pieces, each a table of steps by voices with MIDI pitches (a rest: -1), or of
            steps by 128 pitches. In JSON an object of lists by split (train, valid, test), or a list; in .npz arrays
            named split/piece, or piece.
        folder: Folder to write recordings (FLAC) and metadata.csv to; must be empty or new.
        seconds: Length of a recording.
        sample_rate: Hz.
        instruments: Those to draw from, as piano,organ,...
        tempo: Range of the tempo in beats per minute.
        steps_per_beat: Steps of the table that make a beat.
        copies: How often what is to train on is played, each time drawn anew; the other splits are played once.
        seed: Seed of instruments, tempi and phases.
        workers: Processes that play.
        quiet: No progress on a terminal.
    """
    from tqdm import tqdm

    chosen = [name.strip() for name in instruments.split(",")]
    if unknown := [name for name in chosen if name not in INSTRUMENTS]:
        raise InputError(f"{unknown[0]!r} is no instrument here; there are {', '.join(INSTRUMENTS)}")
    given = {
        "seconds": seconds,
        "tempo": tempo[0],
        "copies": copies,
        "workers": workers,
        "steps-per-beat": steps_per_beat,
    }
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise InputError(f"--{name} is {value}; expected more than 0")
    if not 1000 <= sample_rate <= 192000 or tempo[1] < tempo[0]:
        raise InputError(f"--sample-rate {sample_rate} or --tempo {list(tempo)} is out of range; see --help")
    music = read_scores(scores)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give a new folder")
    make_folder(folder)
    check_writable(folder / "x.flac", sample_rate)
    length, lines = round(seconds * sample_rate), ["file,split,instrument,tempo,seconds"]
    jobs = []
    plays = [
        (number, split, roll, copy)
        for number, (split, roll) in enumerate(music.items())
        for copy in range(copies if split == "train" else 1)
    ]
    for number, split, roll, copy in plays:
        first = 0
        for i in itertools.count():
            rng = np.random.default_rng((seed, number, copy, i))
            name, beats = chosen[rng.integers(len(chosen))], rng.uniform(*tempo)
            step = 60 / beats / steps_per_beat
            last = first + math.ceil(seconds / step)
            if last > len(roll):
                break
            file = f"{split}_{copy}_{i:04}.flac"
            jobs.append((folder / file, roll[first:last], name, step, sample_rate, length, rng))
            lines.append(f"{file},{split},{name},{beats:.1f},{seconds:g}")
            first = last
    if len(lines) == 1:
        raise InputError(f"{scores}: its splits are shorter than {seconds:g} s; give a smaller --seconds")
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
    with (
        pool or nullcontext(),
        tqdm(total=len(jobs), unit=" recordings", disable=quiet or not sys.stderr.isatty(), file=sys.stderr) as bar,
    ):
        for _ in (pool.map if pool else map)(_record, jobs):
            bar.update()
    with replacing(folder / "metadata.csv") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    print(f"{folder}: {len(lines) - 1} recordings of {seconds:g} s at {sample_rate} Hz")


def _record(job: tuple[Path, NDArray[np.bool_], str, float, int, int, np.random.Generator]) -> None:
    path, roll, name, step, sample_rate, length, rng = job
    write_audio(path, play(roll, INSTRUMENTS[name], step, sample_rate, rng)[:length], sample_rate)


def play(
    roll: NDArray[np.bool_], instrument: Instrument, step: float, sample_rate: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """The sound (l,) of a piano roll (steps, 128), its peak at 0.9; `step` is in seconds."""
    wave = np.zeros(math.ceil((len(roll) * step + instrument.release) * sample_rate) + 1)
    edges = np.diff(np.pad(roll.astype(np.int8), ((1, 1), (0, 0))), axis=0)
    for pitch in np.flatnonzero(roll.any(0)):
        phases = rng.uniform(0, 2 * np.pi, PARTIALS)
        starts, ends = (np.flatnonzero(edges[:, pitch] == sign) for sign in (1, -1))
        for steps in np.unique(ends - starts):  # notes of equal pitch and length sound alike
            sound = note(440 * 2 ** ((pitch - 69) / 12), steps * step, instrument, sample_rate, phases)
            for start in starts[ends - starts == steps]:
                at = round(start * step * sample_rate)
                wave[at : at + len(sound)] += sound[: len(wave) - at]
    return (wave * (0.9 / max(np.abs(wave).max(), 1e-9))).astype(np.float32)


def note(
    frequency: float, seconds: float, instrument: Instrument, sample_rate: int, phases: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The sound (l,) of one note: partials with the given phases, those below 95 % of half the sample rate."""
    t = np.arange(math.ceil((seconds + instrument.release) * sample_rate)) / sample_rate
    k = np.arange(1, len(phases) + 1)
    partials = frequency * k * np.sqrt(1 + instrument.stiffness * k**2)
    k, partials = k[partials < 0.475 * sample_rate], partials[partials < 0.475 * sample_rate]
    loudness = k**-instrument.slope * np.where(k % 2 == 0, instrument.odd, 1.0)
    turns = t + instrument.vibrato * np.sin(2 * np.pi * 5.5 * t) / (2 * np.pi * 5.5)
    wave = np.zeros(len(t))
    for partial, amplitude, decay, phase in zip(
        partials, loudness, instrument.slow + instrument.fast * k, phases, strict=False
    ):
        wave += amplitude * np.exp(-decay * t) * np.sin(2 * np.pi * partial * turns + phase)
    rise = np.clip(t / instrument.attack, 0, 1)
    fall = np.clip((seconds + instrument.release - t) / instrument.release, 0, 1)
    return wave * rise * fall / math.sqrt(np.square(loudness).sum())


def read_scores(path: Path) -> dict[str, NDArray[np.bool_]]:
    """Piano rolls (steps, 128) by split: its pieces one after another, a rest after each."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give scores as .json, .json.gz or .npz")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                groups: dict[str, list] = {}
                for name in sorted(arrays.files, key=natural):
                    split = name.partition("/")[0]
                    groups.setdefault(split if split in SPLITS else "train", []).append(arrays[name])
        else:
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            groups = json.loads(text)
            groups = groups if isinstance(groups, dict) else {"train": groups}
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as scores ({error}); expected .json, .json.gz or .npz") from None
    if unknown := sorted(groups.keys() - SPLITS.keys()):
        raise InputError(f"{path}: {unknown[0]!r} is no split; expected {', '.join(SPLITS)}")
    music: dict[str, list[NDArray[np.bool_]]] = {}
    for split, pieces in groups.items():
        for i, piece in enumerate(pieces):
            roll = _as_roll(piece, f"{path}: piece {i} of {split}")
            music.setdefault(SPLITS[split], []).extend((roll, np.zeros((REST, 128), bool)))
    if not music:
        raise InputError(f"{path}: holds no pieces")
    return {split: np.concatenate(rolls) for split, rolls in music.items()}


def _as_roll(piece: object, where: str) -> NDArray[np.bool_]:
    try:
        table = np.asarray(piece, dtype=float)
    except (TypeError, ValueError):
        table = np.zeros(0)
    if table.ndim != 2 or not len(table) or not np.isfinite(table).all():
        raise InputError(f"{where} is no table of numbers, steps by voices or steps by 128 pitches")
    if table.shape[1] == 128:
        return table > 0
    if (table > 127).any() or (table != np.floor(table)).any():
        raise InputError(f"{where} holds {table.max():g}; pitches are whole numbers up to 127, rests are -1")
    roll = np.zeros((len(table), 128), bool)
    steps, voices = np.nonzero(table >= 0)
    roll[steps, table[steps, voices].astype(int)] = True
    return roll
