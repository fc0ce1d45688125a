"""`longseq audio data`: public sets of recordings by name, downloaded with checksums, and what a set holds."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from seqmodels.display import aligned
from seqmodels.downloads import Remote, data_command, download, on_hub
from seqmodels.errors import InputError
from seqmodels.tasks.audio.layouts import LEAK
from seqmodels.tasks.audio.tables import Recordings, open_recordings

MOST_CLASSES = 40  # that `info` counts one by one


@dataclass(frozen=True)
class PublicSet:
    """A set of recordings as published."""

    what: str
    "The work, and its reference."
    content: str
    "What it holds."
    splits: str
    "Its official split."
    home: str
    "Where it comes from, for people."
    find: Callable[[], list[Remote]]
    "Its files."
    warning: str = ""
    "What to know before using it."


_FSDD = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"  # the commit with six speakers; the releases have fewer
SETS = {
    "speech-commands": PublicSet(
        "Speech Commands 0.02 (Warden, 2018), CC BY 4.0",
        "105,829 recordings of 35 words, at most 1 s, 16 kHz",
        "validation_list.txt, testing_list.txt",
        "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
        lambda: [
            Remote(
                "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
                "speech_commands_v0.02.tar.gz",
                "sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
            )
        ],
    ),
    "sc09": PublicSet(
        "SC09: the ten digits of Speech Commands (Donahue et al., 2019; as used by Goel et al., 2022), CC BY 4.0",
        "ten words, at most 1 s, 16 kHz",
        "validation_list.txt, testing_list.txt",
        "https://huggingface.co/datasets/krandiash/sc09",
        partial(on_hub, "krandiash/sc09", "sc09.zip"),
    ),
    "fsdd": PublicSet(
        "Free Spoken Digit Dataset (Jackson et al.), CC BY-SA 4.0",
        "3,000 recordings of 10 digits by 6 speakers, 0.1 to 2.3 s, 8 kHz",
        "index 0-4 is test",
        "https://github.com/Jakobovski/free-spoken-digit-dataset",
        lambda: [
            Remote(
                f"https://github.com/Jakobovski/free-spoken-digit-dataset/archive/{_FSDD}.zip",
                "fsdd.zip",
                None,
                ("recordings", "d04322e322a9f937f6f4f7c8546693755184df5b"),
            )
        ],
    ),
    "beethoven": PublicSet(
        "Beethoven's piano sonatas (Mehri et al., 2017; as used by Goel et al., 2022)",
        "4,328 recordings of 8 s, 16 kHz",
        "the first 3,808, the next 260, the last 260",
        "https://huggingface.co/datasets/krandiash/beethoven",
        partial(on_hub, "krandiash/beethoven", "beethoven.zip"),
    ),
    "youtubemix": PublicSet(
        "YouTubeMix, piano music (DeepSound, 2017; as used by Goel et al., 2022)",
        "241 recordings of 1 min, 16 kHz",
        "the first 212, the next 14, the last 15",
        "https://huggingface.co/datasets/krandiash/youtubemix",
        partial(on_hub, "krandiash/youtubemix", "youtube_mix.zip"),
        LEAK,
    ),
}


def data(words: list[str], pin: Path | None = None, quiet: bool = False) -> int:
    """Public sets of recordings by name, and what is in a set.

        longseq audio data list                what there is, its official split, where from
        longseq audio data get fsdd D          download it to the folder D/fsdd
        longseq audio data info D/fsdd         what `audio train` would read there

    A download keeps the official files, and the other commands read it as it is, with its words and speakers as labels
    and its official split; so do they a folder, zip or tar of these files that is there already. Files are checked
    against what their home publishes. The file source.json in the folder has every file's SHA-256: keep it, and --pin
    makes sure that another download is the same.

    info tells the recordings per split and class, their seconds and rates, how many are silent or clipped, and how many
    are the same, sample by sample, as an earlier one or as one of train.

    Args:
        words: list; get NAME FOLDER; or info PATH...
        pin: source.json of an earlier download, whose files these must be.
        quiet: No progress on a terminal.

    Returns:
        0.
    """
    data_command("audio data", words, _listed, partial(get, pin=pin, quiet=quiet), _described)
    return 0


def get(name: str, folder: Path, pin: Path | None = None, quiet: bool = False) -> Path:
    """Download a set to folder/name; what is there already is left alone."""
    if name not in SETS:
        raise InputError(
            f"{name!r} is no set of recordings here; known are {', '.join(SETS)} (longseq audio data list)"
        )
    target = folder / name
    download(SETS[name].find, target, pin, quiet)
    open_recordings(target)  # says what to know, and that it can be read
    return target


def _listed() -> str:
    parts = []
    for name, one in SETS.items():
        parts += [f"{name}: {one.what}", f"  {one.content}; split: {one.splits}", f"  from {one.home}"]
        parts += [f"  warning: {one.warning}"] if one.warning else []
    return "\n".join(parts)


def _described(path: Path) -> str:
    recordings = open_recordings(path)
    rows = recordings.rows
    splits = list(dict.fromkeys(rows["split"].fill_null("-"))) if "split" in rows.columns else ["all"]
    table, counts, train = [], [], set()
    for split in sorted(splits, key=lambda name: name != "train"):
        chosen = np.arange(rows.height) if splits == ["all"] else np.flatnonzero(rows["split"].fill_null("-") == split)
        part = recordings.select(chosen)
        row, sounds = _measured(part, train)
        table.append({"split": split, **row})
        train = sounds if split == "train" else train
        for column in rows.columns:
            values = part.rows[column].drop_nulls()
            if column not in ("file", "split", "index") and rows[column].n_unique() <= MOST_CLASSES:
                found = dict(values.value_counts().iter_rows())
                shown = ", ".join(f"{value} {found[value]}" for value in sorted(found))
                counts.append(f"{split} {column}: {shown}")
    return f"{path}\n{aligned(table, [*table[0]])}" + "\n".join(counts)


def _measured(recordings: Recordings, train: set[bytes]) -> tuple[dict[str, object], set[bytes]]:
    """What a split holds, and a digest of each sound in it; `train` has those of another split."""
    digests, seconds, rates, silent, clipped = [], [], set(), 0, 0
    for _, wave, rate in recordings.as_recorded():
        digests.append(hashlib.sha256(wave.tobytes()).digest())
        seconds.append(len(wave) / rate)
        rates.add(rate)
        peak = np.abs(wave).max()
        silent += bool(peak < 1e-3)
        clipped += bool(np.count_nonzero(np.abs(wave) >= 32767 / 32768) > 1)
    row = {"recordings": len(digests), "minutes": sum(seconds) / 60, "shortest s": min(seconds)}
    row |= {"median s": float(np.median(seconds)), "longest s": max(seconds), "Hz": "/".join(map(str, sorted(rates)))}
    row |= {"silent": silent, "clipped": clipped, "repeated": len(digests) - len(set(digests))}
    row["in train"] = sum(digest in train for digest in digests) if train else "-"
    return row, set(digests)
