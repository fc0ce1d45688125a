"""Public sets of recordings: their official layout in a folder, zip or tar, and the command `audio data`."""

import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from seqmodels.cli import main
from seqmodels.downloads import Remote
from seqmodels.errors import InputError
from seqmodels.tasks.audio import public
from seqmodels.tasks.audio.layouts import natural
from seqmodels.tasks.audio.tables import open_recordings, parse_conditions, split_rows, split_rules
from seqmodels.tasks.audio.waveform import write_audio

LISTS = {"testing_list.txt": "zero/bb_nohash_0.wav\n", "validation_list.txt": "one/bb_nohash_1.wav\n"}
SPEECH_COMMANDS = {
    "zero/aa_nohash_0.wav": ("zero", "aa", "train"),
    "zero/bb_nohash_0.wav": ("zero", "bb", "test"),
    "one/bb_nohash_1.wav": ("one", "bb", "validation"),
    "one/cc_nohash_10.wav": ("one", "cc", "train"),
}


def sound(path, seed=0, samples=400, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_audio(path, np.random.default_rng(seed).normal(0, 0.1, samples), rate)


def speech_commands(folder):
    for i, name in enumerate(SPEECH_COMMANDS):
        sound(folder / name, i)
    sound(folder / "_background_noise_" / "white_noise.wav", 9, 4000)
    for name, text in LISTS.items():
        (folder / name).write_text(text)
    return folder


def packed(folder, kind):
    path = folder.with_suffix(kind)
    if kind == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, f"sc09/{file.relative_to(folder)}")
    else:
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as archive:
            archive.add(folder, ".")  # names start with ./, as those of Speech Commands
    return path


@pytest.mark.parametrize("kind", ["", ".zip", ".tar", ".tar.gz"])
def test_speech_commands_has_its_official_split_as_a_folder_and_as_an_archive(tmp_path, kind):
    folder = speech_commands(tmp_path / "x")
    recordings = open_recordings(packed(folder, kind) if kind else folder)
    found = {"/".join(Path(r["file"]).parts[-2:]): tuple(r.values())[1:] for r in recordings.rows.iter_rows(named=True)}
    assert found == SPEECH_COMMANDS
    for name, wave in zip(recordings.rows["file"], recordings.read(16000), strict=True):
        expected = open_recordings(folder).select([sorted(SPEECH_COMMANDS).index("/".join(Path(name).parts[-2:]))])
        np.testing.assert_array_equal(wave, expected.read(16000)[0])
    rows = recordings.rows
    parts = split_rows(rows, **split_rules(rows, None, None))
    assert {name: rows["split"][numbers].unique().to_list() for name, numbers in parts.items()} == {
        name: [name] for name in ("train", "validation", "test")
    }
    (words,), _ = parse_conditions(rows, "word")
    assert words.values == ("one", "zero")


def test_spoken_digits_have_labels_and_split_from_their_names(tmp_path):
    for name in ("7_theo_4.wav", "7_theo_5.wav", "0_george_10.wav"):
        sound(tmp_path / "recordings" / name, rate=8000)
    (tmp_path / "README.md").write_text("FSDD")
    rows = open_recordings(tmp_path).rows
    assert rows.rows() == [
        ("recordings/0_george_10.wav", "0", "zero", "george", "10", "train"),
        ("recordings/7_theo_4.wav", "7", "seven", "theo", "4", "test"),
        ("recordings/7_theo_5.wav", "7", "seven", "theo", "5", "train"),
    ]
    sound(tmp_path / "recordings" / "other.wav")
    assert open_recordings(tmp_path).rows.columns == ["file"]


@pytest.mark.parametrize(("title", "pattern"), [("beethoven", "{}.wav"), ("youtube_mix", "out{:03}.wav")])
def test_music_is_split_in_the_natural_order_of_its_names(tmp_path, title, pattern, capsys):
    count = 50
    for i in range(count):
        sound(tmp_path / title / pattern.format(i), i, 20)
    rows = open_recordings(tmp_path / title).rows
    assert rows["file"].to_list() == [pattern.format(i) for i in range(count)]
    assert rows["split"].to_list() == ["train"] * 44 + ["validation"] * 3 + ["test"] * 3
    assert ("six times" in capsys.readouterr().err) == (title == "youtube_mix")


@pytest.mark.parametrize(("count", "first", "second"), [(4328, 3808, 4068), (241, 212, 226)])
def test_the_sizes_of_the_published_splits_come_out(count, first, second):
    from seqmodels.tasks.audio.layouts import known_layout

    split = known_layout(Path("beethoven.zip"), [f"b/{i}.wav" for i in range(count)], None)["split"].to_list()
    assert (split.index("validation"), split.index("test")) == (first, second)


def test_numbers_in_names_sort_as_numbers():
    names = ["b10.wav", "b9.wav", "a.wav", "10.wav", "9.wav"]
    assert sorted(names, key=natural) == ["9.wav", "10.wav", "a.wav", "b9.wav", "b10.wav"]


def test_a_table_goes_before_the_layout(tmp_path):
    speech_commands(tmp_path)
    (tmp_path / "metadata.csv").write_text("file,mood\nzero/aa_nohash_0.wav,calm\n")
    assert open_recordings(tmp_path).rows.columns == ["file", "mood"]


def test_a_truncated_tar_is_refused_in_one_line(tmp_path):
    path = packed(speech_commands(tmp_path / "x"), ".tar.gz")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="not a whole archive"):
        open_recordings(path)


def test_a_set_is_downloaded_described_and_read_as_it_is(server, tmp_path, monkeypatch, capsys):
    folder, address = server
    archive = packed(speech_commands(tmp_path / "x"), ".zip")
    (folder / "sc09.zip").write_bytes(archive.read_bytes())
    remote = Remote(f"{address}/sc09.zip", "sc09.zip", None)
    monkeypatch.setitem(public.SETS, "sc09", public.PublicSet("w", "c", "s", "h", lambda: [remote]))
    assert main(["audio", "data", "get", "sc09", str(tmp_path / "d")]) == 0
    assert open_recordings(tmp_path / "d" / "sc09").rows["split"].to_list() == ["validation", "train", "train", "test"]
    capsys.readouterr()
    sound(tmp_path / "d" / "sc09" / "one" / "cc_nohash_10.wav", 1)  # now the same as zero/bb_nohash_0 of test
    assert main(["audio", "data", "info", str(tmp_path / "d" / "sc09")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["train", "2", "0.000833333", "0.025", "0.025", "0.025", "16000", "0", "0", "0", "-"] in lines
    assert ["test", "1", "0.000416667", "0.025", "0.025", "0.025", "16000", "0", "0", "0", "1"] in lines
    assert ["train", "word:", "one", "1,", "zero", "1"] in lines


def test_list_names_every_set_and_its_warning(capsys):
    assert main(["audio", "data", "list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in public.SETS)
    assert "six times" in out
    assert main(["audio", "data", "get", "nothing", "here"]) == 2
    assert "known are speech-commands, sc09, fsdd" in capsys.readouterr().err
    assert main(["audio", "data", "get"]) == 2
    assert "list, get NAME FOLDER, or info PATH" in capsys.readouterr().err


@pytest.mark.data
def test_the_names_of_the_spoken_digits_say_what_their_table_says(tmp_path):
    folder = Path(os.environ["LONGSEQ_DATA"]) / "audio" / "fsdd"
    (tmp_path / "fsdd.zip").symlink_to(folder / "fsdd_flac.zip")
    by_name, by_table = open_recordings(tmp_path).rows, open_recordings(folder).rows
    columns = ["file", "digit", "word", "speaker", "index", "split"]
    assert by_name.select(columns).sort("file").equals(by_table.select(columns).sort("file"))
