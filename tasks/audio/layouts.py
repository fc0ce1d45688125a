"""Public sets of recordings as they are published: their file names and lists, read as a table with official splits.

Speech Commands, and SC09, its ten digits (Warden, 2018): word/speaker_nohash_0.wav, validation_list.txt and
testing_list.txt. FSDD: digit_speaker_index.wav, of which index 0-4 is test. Beethoven and YouTubeMix (Goel et al.,
2022): a folder or archive of that name with numbered files, of which the first 88 % are for training, then 6 % for
validation. Rows are in the natural order of the names, so that labels are in the order of theirs.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import polars as pl

from seqmodels.tasks.audio.waveform import is_audio_name

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEAK = (
    "YouTubeMix repeats about 45 minutes of music six times: its validation and test recordings are also in its "
    "training recordings, so its figures show memory, too (github.com/deepsound-project/samplernn-pytorch/issues/47)"
)
_LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}
_FSDD = re.compile(r"(\d)_([a-z]+)_(\d+)\.\w+")
_SPEECH_COMMANDS = re.compile(r"(\w+)_nohash_\d+\.\w+")


def known_layout(source: Path, names: Sequence[str], read: Callable[[str], bytes]) -> pl.DataFrame | None:
    """The table of the files `names` in a folder or archive, if they are laid out like a public set; otherwise None.

    `read` gives a file's content.
    """
    sounds = sorted(filter(is_audio_name, names), key=natural)
    if not sounds:
        return None
    lists = {split: [n for n in names if PurePosixPath(n).name == wanted] for split, wanted in _LISTS.items()}
    if all(lists.values()):
        return _speech_commands(sounds, {split: read(found[0]).decode() for split, found in lists.items()})
    if all(_FSDD.fullmatch(PurePosixPath(name).name) for name in sounds):
        return _fsdd(sounds)
    title = re.sub(r"[^a-z]", "", source.name.partition(".")[0].lower())
    if title == "youtubemix":
        print(f"warning: {LEAK}", file=sys.stderr)
    if title in ("beethoven", "youtubemix"):
        n = len(sounds)
        ends = int(0.88 * n), int(0.94 * n)
        splits = ["train" if i < ends[0] else "validation" if i < ends[1] else "test" for i in range(n)]
        return pl.DataFrame({"file": sounds, "split": splits})
    return None


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _speech_commands(sounds: list[str], lists: dict[str, str]) -> pl.DataFrame:
    official = {name: split for split, text in lists.items() for name in text.split()}
    rows = []
    for name in sounds:
        path = PurePosixPath(name)
        if spoken := _SPEECH_COMMANDS.fullmatch(path.name):  # not _background_noise_
            word = path.parent.name
            rows.append((name, word, spoken[1], official.get(f"{word}/{path.name}", "train")))
    return pl.DataFrame(rows, schema=["file", "word", "speaker", "split"], orient="row")


def _fsdd(sounds: list[str]) -> pl.DataFrame:
    rows = []
    for name in sounds:
        digit, speaker, index = _FSDD.fullmatch(PurePosixPath(name).name).groups()
        rows.append((name, digit, DIGITS[int(digit)], speaker, index, "test" if int(index) < 5 else "train"))
    return pl.DataFrame(rows, schema=["file", "digit", "word", "speaker", "index", "split"], orient="row")
