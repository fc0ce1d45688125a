"""Laws of tables, splits and training batches of recordings."""

import dataclasses
import os
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from seqmodels.errors import InputError
from seqmodels.tasks.audio.datasets import IGNORED, ClipData, LabelData, batches, cut_batches, lay_out, split_long
from seqmodels.tasks.audio.tables import match_conditions, open_recordings, parse_conditions, split_rows
from seqmodels.tasks.audio.waveform import MuLaw, write_audio

MU_LAW = MuLaw()


def waves(count=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 0.1, rng.integers(300, 3000)).clip(-1, 1).astype(np.float32) for _ in range(count)]


def clip_data(count=40, **options):
    rng = np.random.default_rng(1)
    labels = np.stack([rng.integers(0, 10, count), rng.integers(0, 6, count)], axis=1)
    mu_law, texts = options.pop("mu_law", MU_LAW), options.pop("texts", None)
    train = lay_out(waves(count), mu_law, speeds=options.pop("speeds", (94, 106)), labels=labels, texts=texts)
    validation = lay_out(waves(7, 3), mu_law, labels=labels[:7], texts=texts and texts[:7])
    return ClipData(train, validation, np.array([10, 6]), **({"batch_tokens": 8192} | options))


def sequence(clips, speed, clip):
    """Tokens of a clip after BOS, EOS included."""
    start = clips.offsets[speed, clip] + 1
    return clips.tokens(clips.samples[start : start + clips.lengths[speed, clip]])


@pytest.fixture
def library(tmp_path):
    """Ten recordings as a folder with metadata.csv, and the same in a zip."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    lines = ["file,word,speaker,index,split"]
    for i, wave in enumerate(waves(10)):
        write_audio(folder / f"{i}.flac", wave, 8000)
        lines.append(f"{i}.flac,{('zero', 'one', 'two')[i % 3]},{'theo' if i % 2 else 'ann'},{i},{'test' * (i < 2)}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    with zipfile.ZipFile(tmp_path / "sounds.zip", "w") as archive:
        for path in folder.glob("*.flac"):
            archive.write(path, path.name)
    return folder


def test_a_zip_and_its_folder_hold_the_same_recordings(library):
    in_folder = open_recordings(library)
    in_zip = open_recordings(library.parent / "sounds.zip", library / "metadata.csv")
    assert in_folder.rows.equals(in_zip.rows)
    for a, b in zip(in_folder.read(8000), in_zip.read(8000), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_folder_without_a_table_is_every_recording_in_it_without_labels(library):
    (library / "metadata.csv").unlink()
    recordings = open_recordings(library)
    assert recordings.rows.columns == ["file"]
    assert recordings.rows["file"].to_list() == [f"{i}.flac" for i in range(10)]


def test_recordings_are_read_at_the_rate_that_is_asked_for(library):
    recordings = open_recordings(library)
    whole, half = recordings.read(8000), recordings.read(4000)
    assert [len(wave) for wave in half] == [-(-len(wave) // 2) for wave in whole]


def test_conditions_keep_the_order_of_the_table_and_match_it_again(library):
    rows = open_recordings(library).rows
    conditions, ids = parse_conditions(rows, "digit=word, speaker")
    assert [(c.name, c.values) for c in conditions] == [
        ("digit", ("zero", "one", "two")),
        ("speaker", ("ann", "theo")),
    ]
    assert ids[:4].tolist() == [[0, 0], [1, 1], [2, 0], [0, 1]]
    np.testing.assert_array_equal(match_conditions(rows, conditions), ids)
    np.testing.assert_array_equal(match_conditions(rows, conditions, "digit=word"), ids)


def test_an_empty_cell_is_a_label_that_is_not_given():
    rows = pl.DataFrame({"file": ["a", "b"], "word": ["one", None]})
    conditions, ids = parse_conditions(rows, "word")
    assert conditions[0].values == ("one",)
    assert ids.tolist() == [[0], [1]]


def test_an_unknown_value_of_a_trained_condition_is_refused(library):
    rows = open_recordings(library).rows
    conditions, _ = parse_conditions(rows[:2], "word")
    with pytest.raises(InputError, match="no column of the table"):
        match_conditions(rows, conditions)
    with pytest.raises(InputError, match="'two'"):
        match_conditions(rows, conditions, "word=word")


@pytest.mark.parametrize("validation", ["0.25", "index=5-7", "index=3,4", ""])
@pytest.mark.parametrize("test", ["split=test", "speaker=theo", "0.2", ""])
def test_the_three_parts_of_a_split_are_disjoint_and_complete(library, test, validation):
    rows = open_recordings(library).rows
    parts = split_rows(rows, test=test, validation=validation)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(10))
    assert all(np.array_equal(part, np.sort(part)) for part in parts.values())
    again = split_rows(rows, test=test, validation=validation)
    assert all(np.array_equal(parts[name], again[name]) for name in parts)


def test_a_rule_selects_the_rows_it_names(library):
    parts = split_rows(open_recordings(library).rows, test="split=test", validation="index=5-7")
    assert parts["test"].tolist() == [0, 1]
    assert parts["validation"].tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [("colour=red", "the column 'colour'"), ("index=77", "selects no rows"), ("1.5", "fraction"), ("ten", "fraction")],
)
def test_a_rule_that_cannot_be_followed_is_refused(library, rule, reason):
    with pytest.raises(InputError, match=reason):
        split_rows(open_recordings(library).rows, test=rule, validation="")


def test_a_split_that_leaves_nothing_to_train_on_is_refused(library):
    with pytest.raises(InputError, match="no rows are left"):
        split_rows(open_recordings(library).rows, test="speaker=theo", validation="speaker=ann")


def test_missing_data_tables_columns_and_files_are_refused(library, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        open_recordings(tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither a folder nor a zip"):
        open_recordings(library / "0.flac")
    (tmp_path / "void").mkdir()
    with pytest.raises(InputError, match="no recordings"):
        open_recordings(tmp_path / "void")
    (tmp_path / "other.csv").write_text("name\nx\n")
    with pytest.raises(InputError, match="no column 'file'"):
        open_recordings(library, tmp_path / "other.csv")
    (tmp_path / "other.csv").write_text("file\nghost.flac\n")
    with pytest.raises(InputError, match=r"ghost\.flac"):
        open_recordings(library, tmp_path / "other.csv").read(8000)
    with pytest.raises(InputError, match=r"ghost\.flac"):
        open_recordings(tmp_path / "sounds.zip", tmp_path / "other.csv").read(8000)


def test_a_sequence_is_begin_samples_end_and_targets_are_one_step_ahead():
    wave = waves(1)[0]
    (batch,) = batches(lay_out([wave], MU_LAW), 8192, longest=None)
    samples = torch.from_numpy(MU_LAW.tokens(wave, 8000)[0])
    n = len(samples)
    assert batch["ids"].shape[1] % 256 == 0
    assert batch["ids"][0, 0] == 256
    assert torch.equal(batch["ids"][0, 1 : n + 1], samples)
    assert torch.equal(batch["targets"][0, :n], samples)
    assert batch["targets"][0, n] == 257
    assert (batch["targets"][0, n + 1 :] == -100).all()


def test_a_training_batch_is_a_pure_function_of_seed_and_step():
    data, other = clip_data(), clip_data()
    later = [other.train_batch(step) for step in (31, 4)]
    for step, expected in zip((31, 4), later, strict=True):
        found = data.train_batch(step)
        assert found.keys() == {"ids", "targets", "conditions"}
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert data.tokens(step) == (found["targets"] >= 0).sum()
    changed = dataclasses.replace(clip_data(), seed=1).train_batch(4)
    assert not torch.equal(changed["targets"], later[1]["targets"])


def test_every_clip_occurs_once_per_epoch_in_one_of_its_variants():
    data = clip_data()
    step = 0
    used = set()
    for epoch in range(4):
        seen = []
        stop = step + len(data._plan(epoch).groups)
        for step in range(step, stop):  # noqa: B020 - goes on where the last epoch stopped
            for targets in data.train_batch(step)["targets"]:
                seen.append(targets[targets >= 0].numpy())
        step = stop
        clips = []
        for tokens in seen:
            variant, clip = next(
                (v, c)
                for v, c in zip(*np.nonzero(data.train.lengths == len(tokens)), strict=True)
                if np.array_equal(sequence(data.train, v, c), tokens)
            )
            clips.append(int(clip))
            used.add(int(variant))
        assert sorted(clips) == list(range(40))
    assert used == {0, 1, 2}


def test_batches_keep_to_the_token_budget_with_little_padding():
    data = clip_data(400, batch_tokens=16384, speeds=())
    sizes, real = [], 0
    for step in range(data.steps_per_epoch()):
        batch = data.train_batch(step)
        sizes.append(batch["ids"].numel())
        real += int((batch["targets"] >= 0).sum())
    assert max(sizes) <= 16384
    assert np.mean(sizes) > 0.85 * 16384
    assert min(sizes) > 0.25 * 16384
    assert real / sum(sizes) > 0.85


def test_labels_follow_their_clips_and_are_withheld_at_the_given_rate():
    data = clip_data(speeds=(), as_recorded=1.0)
    by_sequence = {}
    for clip in range(len(data.train)):
        by_sequence[tuple(sequence(data.train, 0, clip).tolist())] = data.train.labels[clip]
    withheld = []
    for step in range(150):
        batch = data.train_batch(step)
        for targets, labels in zip(batch["targets"], batch["conditions"].numpy(), strict=True):
            truth = by_sequence[tuple(targets[targets >= 0].tolist())]
            withheld.append(labels == data.not_given)
            assert ((labels == truth) | withheld[-1]).all()
    rate, both = np.mean(withheld, axis=0), np.mean(np.all(withheld, axis=1))
    noise = 5 * np.sqrt(0.25 / len(withheld))
    assert np.abs(rate - (1 - 0.9**2)).max() < noise  # by itself, or with all others
    assert abs(both - (1 - 0.9 * (1 - 0.1**2))) < noise


def test_validation_batches_hold_every_clip_with_all_labels():
    data = clip_data()
    found = data.validation_batches()
    clips = torch.cat([batch["clips"] for batch in found]).numpy()
    labels = torch.cat([batch["conditions"] for batch in found]).numpy()
    assert sorted(clips) == list(range(7))
    np.testing.assert_array_equal(labels, data.validation.labels[clips])
    assert sum(int((batch["targets"] >= 0).sum()) for batch in found) == data.validation.lengths.sum()


def test_pieces_of_a_long_clip_join_to_the_whole():
    clips = lay_out(waves(3), MU_LAW)
    pieces, offsets, lengths = split_long(clips.offsets[0], clips.lengths[0], 500)
    assert lengths.max() <= 500
    for clip in range(3):
        ends = zip(offsets[pieces == clip] + 1, (offsets + lengths)[pieces == clip] + 1, strict=True)
        joined = np.concatenate([clips.samples[start:end] for start, end in ends])
        np.testing.assert_array_equal(clips.tokens(joined), sequence(clips, 0, clip))


def test_no_piece_is_longer_than_the_longest_context_and_none_is_lost():
    data = clip_data(speeds=(), longest=700)
    batches_of_epoch = [data.train_batch(step) for step in range(data.steps_per_epoch())]
    assert max(batch["ids"].shape[1] for batch in batches_of_epoch) == 768  # padded to a multiple of 256
    assert max(int((batch["targets"] >= 0).sum(1).max()) for batch in batches_of_epoch) == 700
    counted = sum(int((batch["targets"] >= 0).sum()) for batch in batches_of_epoch)
    assert counted == data.train.lengths[0].sum()
    assert max(batch["ids"].shape[1] for batch in data.validation_batches()) == 768
    assert (
        max(batch["ids"].shape[1] for batch in clip_data(longest=10**9, batch_tokens=512).validation_batches()) == 512
    )


def test_cutting_into_batches_uses_every_piece_once():
    lengths = np.random.default_rng(0).integers(1, 5000, 300)
    groups = cut_batches(lengths, 8192)
    assert sorted(np.concatenate([members for members, _ in groups])) == list(range(300))
    assert all(lengths[members].max() <= width for members, width in groups)


def test_a_faster_variant_is_shorter_and_higher():
    tone = (0.5 * np.sin(2 * np.pi * 1000 * np.arange(8000) / 8000)).astype(np.float32)
    clips = lay_out([tone], MU_LAW, speeds=(106,))
    faster = MU_LAW.decode(sequence(clips, 1, 0)[:-1])
    assert len(faster) == -(-8000 * 100 // 106)
    peak = np.argmax(np.abs(np.fft.rfft(faster * np.hanning(len(faster))))) * 8000 / len(faster)
    assert peak == pytest.approx(1060, abs=2)


def test_a_clip_is_varied_in_sign_level_and_the_silence_before_it():
    clips = lay_out(waves(1), MU_LAW)
    data = ClipData(clips, clips, np.zeros(0, np.int64), 8192, flip=True, quieter=12.0, silence=500)
    wave, factors, silences = clips.samples[1:-1], [], []
    for step in range(80):
        (ids,), (targets,) = (data.train_batch(step)[name].numpy() for name in ("ids", "targets"))
        heard = targets[targets != IGNORED]
        assert (ids[0], heard[-1]) == (MU_LAW.bos, MU_LAW.eos)
        np.testing.assert_array_equal(ids[1 : len(heard)], heard[:-1])
        silence, samples = len(heard) - 1 - len(wave), MU_LAW.decode(heard[:-1])
        assert (heard[:silence] == MU_LAW.levels // 2).all()
        factors.append(np.dot(samples[silence:], wave) / np.dot(wave, wave))
        assert np.abs(samples[silence:] - factors[-1] * wave).max() < 0.03
        silences.append(silence)
    levels = 20 * np.log10(np.abs(factors))
    assert abs(np.mean(np.sign(factors))) < 0.5
    assert -12.1 < levels.min() < -11
    assert -1 < levels.max() < 0.1
    assert 0 <= min(silences) < 50 < 450 < max(silences) <= 500


def test_text_stands_before_each_piece_and_is_neither_learned_nor_always_told():
    mu_law, words = MuLaw(text=16), [f"clip {i}" for i in range(40)]
    data = clip_data(speeds=(), mu_law=mu_law, texts=words, batch_tokens=1024, label_dropout=0.2)
    told = []
    for step in range(data.steps_per_epoch()):
        batch = data.train_batch(step)
        assert batch["ids"].numel() <= max(1024, batch["ids"].shape[1])
        assert (batch["targets"][:, :16] == IGNORED).all()
        assert not set(batch["targets"][:, 16:].unique().tolist()) & set(mu_law.unsound)
        told += batch["ids"][:, :16].tolist()
    told = [bytes(np.subtract(row, mu_law.nul).tolist()).strip(b"\0").decode() for row in told]
    assert set(told) <= {*words, ""}
    assert len(set(told)) > 20
    assert 0.2 < np.mean([not text for text in told]) < 0.52  # 0.36 of the pieces are not
    for batch in data.validation_batches():
        for row, clip in zip(batch["ids"], batch["clips"], strict=True):
            np.testing.assert_array_equal(row[:16], mu_law.text_tokens(words[clip]))


def test_a_classifier_reads_the_clip_and_is_asked_for_its_label():
    clips = clip_data(speeds=(), label_dropout=0.0)
    batch, same = LabelData(clips).train_batch(3), clips.train_batch(3)
    assert batch.keys() == {"ids", "lengths", "targets"}
    assert torch.equal(batch["targets"], same["conditions"][:, 0])
    for row, length, targets in zip(batch["ids"], batch["lengths"], same["targets"], strict=True):
        assert row[0] == MU_LAW.bos
        np.testing.assert_array_equal(row[1:length], targets[: length - 1])
    assert sum(len(batch["targets"]) for batch in LabelData(clips).validation_batches()) == 7


def test_half_of_the_clips_are_noisy_down_to_the_ratio_and_never_clipped_the_same_at_every_reading():
    options = {"speeds": (), "label_dropout": 0.0}
    clean, noisy = clip_data(**options), clip_data(**options, noise=3.0)
    ratios, untouched = [], 0
    for step in range(60):
        before, after = clean.train_batch(step), noisy.train_batch(step)
        assert torch.equal(after["targets"], clip_data(**options, noise=3.0).train_batch(step)["targets"])
        assert noisy.tokens(step) == clean.tokens(step)
        for a, b in zip(before["targets"], after["targets"], strict=True):
            assert torch.equal(a < 0, b < 0)
            assert (b == MU_LAW.eos).sum() == 1
            x, y = (MU_LAW.decode(t[(t >= 0) & (t < MU_LAW.levels)].numpy()).astype(float) for t in (a, b))
            assert np.abs(y).max() < 0.99
            if np.array_equal(x, y):
                untouched += 1
                continue
            gain = (x @ y) / (x @ x)  # noise is nearly orthogonal to the clip
            ratios.append(10 * np.log10(np.square(x).mean() / np.square(y / gain - x).mean()))
    assert untouched / (untouched + len(ratios)) == pytest.approx(0.5, abs=0.08)
    assert min(ratios) > 2.5
    assert min(ratios) < 5
    assert max(ratios) > 25


def test_half_of_the_clips_lose_a_stretch_no_longer_than_the_mask_to_silence():
    options = {"speeds": (), "label_dropout": 0.0}
    clean, masked = clip_data(**options), clip_data(**options, mask=200)
    kept, lost = clean.train.samples.copy(), []
    for step in range(60):
        for a, b in zip(clean.train_batch(step)["ids"], masked.train_batch(step)["ids"], strict=True):
            changed = (a != b).nonzero().flatten()
            assert (b[changed] == MU_LAW.levels // 2).all()
            lost.append(int(changed[-1] - changed[0]) + 1 if len(changed) else 0)
    assert max(lost) <= 200
    assert max(lost) > 150
    assert np.mean(np.array(lost) > 0) == pytest.approx(0.5, abs=0.08)
    np.testing.assert_array_equal(masked.train.samples, kept)  # the clips themselves lose nothing


def test_input_noise_is_on_what_is_read_and_never_on_what_is_to_be_told():
    options = {"speeds": (), "label_dropout": 0.0}
    clean, noisy, measures = clip_data(**options), clip_data(**options, input_noise=4.0), []
    for step in range(60):
        before, after = clean.train_batch(step), noisy.train_batch(step)
        assert torch.equal(before["targets"], after["targets"])
        assert torch.equal(after["ids"], clip_data(**options, input_noise=4.0).train_batch(step)["ids"])
        sound = before["ids"] < MU_LAW.levels
        assert torch.equal(before["ids"][~sound], after["ids"][~sound])
        assert after["ids"][sound].max() < MU_LAW.levels
        inner = sound & (before["ids"] > 20) & (before["ids"] < MU_LAW.levels - 20)
        for a, b, where in zip(before["ids"], after["ids"], inner, strict=True):
            measures.append(float((b - a)[where].double().std()))
    measures = np.array(measures)
    assert measures.max() < 4.3
    assert np.quantile(measures, [0.25, 0.5, 0.75]) == pytest.approx([1, 2, 3], abs=0.4)  # even from 0 to 4
    for a, b in zip(clean.validation_batches(), noisy.validation_batches(), strict=True):
        assert torch.equal(a["ids"], b["ids"])


@pytest.mark.data
def test_the_spoken_digits_are_what_their_readme_says():
    recordings = open_recordings(Path(os.environ["LONGSEQ_DATA"]) / "audio" / "fsdd")
    conditions, ids = parse_conditions(recordings.rows, "digit=word,speaker")
    parts = split_rows(recordings.rows, test="split=test", validation="index=5-9")
    assert {name: len(part) for name, part in parts.items()} == {"train": 2400, "validation": 300, "test": 300}
    assert " ".join(conditions[0].values) == "zero one two three four five six seven eight nine"
    assert conditions[1].values == ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
    assert (np.bincount(ids[:, 0] * 6 + ids[:, 1]) == 50).all()
    lengths = [len(wave) for wave in recordings.read(8000)]
    assert lengths == recordings.rows["n_samples"].cast(int).to_list()
    assert sum(lengths) == 10_498_424
