import csv
import gzip

import numpy as np
import pytest
import torch
from scipy import stats

from seqmodels.errors import InputError
from seqmodels.tasks.genomics import datasets
from seqmodels.tasks.genomics.datasets import (
    Augmentation,
    Stretch,
    parse_lengths,
    spaced_windows,
    taken,
    training_data,
)
from seqmodels.tasks.genomics.labelled import load_labelled
from seqmodels.tasks.genomics.tokens import A, N, T, decode, encode, reverse_complement

OPTIONS = {
    "batch_tokens": 400,
    "validation_fraction": 0.2,
    "validation_windows": 5,
    "augment": Augmentation(reverse_complement=False),
    "seed": 3,
}


def random_bases(rng, length):
    return "".join(rng.choice(list("ACGT"), length))


@pytest.fixture
def long_folder(tmp_path):
    """Three classes; class b has two records in one file; one test record."""
    rng = np.random.default_rng(0)
    rows = []
    for file, record, species, length, split in (
        ("x.fa.gz", "r1", "c c", 3000, "train"),
        ("y.fa.gz", "r2", "a", 2000, "train"),
        ("z.fa.gz", "r3", "b", 1000, "train"),
        ("z.fa.gz", "r4", "b", 1500, "train"),
        ("t.fa.gz", "r5", "a", 900, "test"),
    ):
        with gzip.open(tmp_path / file, "at") as f:
            f.write(f">{record} some text\n{random_bases(rng, length)}\n")
        rows.append({"file": file, "record": record, "label": "7", "species": species, "split": split})
    with open(tmp_path / "metadata.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


@pytest.fixture
def short_table(tmp_path):
    rng = np.random.default_rng(1)
    rows = [f"{random_bases(rng, int(rng.integers(5, 40)))},{label}" for label in "yxz" * 20]
    (tmp_path / "train.csv").write_text("sequence,label\n" + "\n".join(rows) + "\n")
    return tmp_path / "train.csv"


def test_classes_are_numbered_by_sorted_name(long_folder, short_table):
    records = load_labelled(long_folder, split="train")
    assert records.classes == ("a", "b", "c c")
    assert records.names == ["r1", "r2", "r3", "r4"]
    assert records.labels.tolist() == [2, 0, 1, 1]
    assert load_labelled(short_table).classes == ("x", "y", "z")


def test_tables_with_tabs_and_compressed_ones_say_the_same(short_table, tmp_path):
    expected = load_labelled(short_table)
    text = short_table.read_text()
    (tmp_path / "t.tsv").write_text(text.replace(",", "\t"))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("t.tsv", "t.csv.gz"):
        found = load_labelled(tmp_path / name)
        assert found.labels.tolist() == expected.labels.tolist()
        assert all(np.array_equal(a, b) for a, b in zip(found.tokens, expected.tokens, strict=True))


def test_fasta_records_get_their_labels_by_name(tmp_path):
    (tmp_path / "x.fa").write_text(">b text\nACG\n>a\nGGT\n")
    (tmp_path / "labels.tsv").write_text("record\tlabel\na\tfirst\nb\tsecond\nunused\tfirst\n")
    records = load_labelled(tmp_path / "x.fa", tmp_path / "labels.tsv")
    assert [decode(t) for t in records.tokens] == ["ACG", "GGT"]
    assert [records.classes[i] for i in records.labels] == ["second", "first"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.csv": ""}, "is empty"),
        ({"x.csv": "a,b\n1,2\n"}, "has the columns a, b; expected sequence and label"),
        ({"x.csv": "sequence,label\n"}, "no records"),
        ({"x.csv": "sequence,label\nACGT,0\nAC5T,1\n"}, "line 3: '5' at position 3 is no base"),
        ({"x.csv": "sequence,label\nNNNN,0\n"}, "line 2 has no A, C, G or T"),
        ({"x.csv": "sequence,label\nACGT,\n"}, "line 2 has no label"),
        ({"x.csv": "sequence,label\nACGT,0,1,2\n"}, "line 2 has 4 columns, the first line has 2"),
        ({"x.csv": b"\x80\xff\xfe"}, "not text in UTF-8"),
        ({"x.fa": ">a\nACGT\n"}, "needs a table of labels"),
        ({"x.fa": ">a\nACGT\n", "l.tsv": "record\tlabel\nb\t1\n"}, "no label for record 'a'"),
        ({"x.fa": ">a\nACGT\n", "l.tsv": "record\tlabel\na\t1\na\t2\n"}, "two labels, '1' and '2'"),
        ({"x.fa": ">a\nACGT\n", "l.tsv": "name\tlabel\na\t1\n"}, "expected record and label"),
        ({"x.fa": ">a\nACGT\n>a\nACGT\n", "l.tsv": "record\tlabel\na\t1\n"}, "two records named 'a'"),
        ({"x.csv": "file,record,label\nmissing.fa,a,1\n"}, "does not exist"),
        ({"x.csv": "file,record,label\ny.fa,b,1\n", "y.fa": ">a\nAC\n"}, "names record 'b', which y.fa does not have"),
        ({"x.csv": "file,record\ny.fa,b\n"}, "neither a column species nor a column label"),
        ({}, "does not exist"),
    ],
)
def test_bad_labelled_data_are_told_in_one_line(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    labels = tmp_path / "l.tsv" if "l.tsv" in files else None
    with pytest.raises(InputError) as error:
        load_labelled(tmp_path / next(iter(files), "x.csv"), labels)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_label_that_the_model_does_not_know_is_told(short_table):
    with pytest.raises(InputError, match=r"label 'y' of row_2 is not a class of the model \(x, z\)"):
        load_labelled(short_table, classes=("x", "z"))


def test_lengths_are_read_from_text():
    assert parse_lengths("1024,8192") == parse_lengths("[1024, 8192]") == parse_lengths([1024, 8192]) == [1024, 8192]
    assert parse_lengths(None) == parse_lengths("") == []
    for bad in ("10,x", "0", "1024;8192"):
        with pytest.raises(InputError, match="window"):
            parse_lengths(bad)


@pytest.fixture(params=["long", "short"])
def data(request, long_folder, short_table):
    def make(**options):
        if request.param == "long":
            return training_data(load_labelled(long_folder, split="train"), [20, 100], **{**OPTIONS, **options})
        return training_data(load_labelled(short_table), [], **{**OPTIONS, **options})

    return make


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_training_batch_is_a_function_of_seed_and_step(data):
    first, second, other = data(), data(), data(seed=4)
    assert same(first.train_batch(5), second.train_batch(5))  # whatever was asked before
    first.train_batch(6)
    assert same(first.train_batch(5), second.train_batch(5))
    assert not same(first.train_batch(5), first.train_batch(6))
    assert not same(first.train_batch(5), other.train_batch(5))
    assert all(same(a, b) for a, b in zip(first.validation_batches(), second.validation_batches(), strict=True))


def test_batches_keep_to_the_token_budget(data):
    data = data()
    for batch in [data.train_batch(step) for step in range(20)] + data.validation_batches():
        assert batch["ids"].numel() <= 400
        assert batch["ids"].dtype == batch["targets"].dtype == batch["lengths"].dtype == torch.int64
        assert len(batch["ids"]) == len(batch["targets"]) == len(batch["lengths"])
        assert (batch["ids"] == 4).sum() == batch["ids"].numel() - batch["lengths"].sum()  # padding and nothing else


def test_windows_double_during_the_warm_up_at_as_many_bases_per_batch(long_folder, short_table, monkeypatch):
    monkeypatch.setattr(datasets, "SHORTEST", 16)
    records = load_labelled(long_folder, split="train")
    warm, cold = (training_data(records, [20, 100], **OPTIONS, length_warmup=n) for n in (12, 0))
    for step in range(20):
        length, full = (data.train_batch(step)["ids"].shape[1] for data in (warm, cold))
        assert length == min(full, [16, 32, 64, 100][min(step // 4, 3)])
        assert len(warm.train_batch(step)["ids"]) == 400 // length
    assert all(torch.equal(warm.train_batch(12)[name], tensor) for name, tensor in cold.train_batch(12).items())
    with pytest.raises(InputError, match="length_warmup is for windows of long records"):
        training_data(load_labelled(short_table), [], **OPTIONS, length_warmup=5)


def test_no_validation_sequence_is_seen_in_training(data):
    data = data()
    seen = " ".join(
        decode(ids[:n].numpy().astype(np.uint8))
        for step in range(300)
        for ids, n in zip(*(data.train_batch(step)[key] for key in ("ids", "lengths")), strict=True)
    )
    for batch in data.validation_batches():
        for ids, n in zip(batch["ids"], batch["lengths"], strict=True):
            held_out = decode(ids[:n].numpy().astype(np.uint8))
            starts = range(max(1, len(held_out) - 15)) if isinstance(data.training[0], Stretch) else [0]
            assert all(f"{held_out[i : i + 16]}" not in seen for i in starts if len(held_out) >= 16)


def test_held_out_stretches_and_training_stretches_make_up_each_record(long_folder):
    records = load_labelled(long_folder, split="train")
    data = training_data(records, [20], **OPTIONS)
    for i, tokens in enumerate(records.tokens):
        covered = np.zeros(len(tokens), dtype=int)
        for stretch in data.training + data.validation:
            if stretch.record == i:
                covered[stretch.start : stretch.end] += 1
        assert (covered == 1).all()
        assert sum(len(s) for s in data.validation if s.record == i) == round(0.2 * len(tokens))


def test_each_window_comes_from_a_record_of_its_class(long_folder):
    records = load_labelled(long_folder, split="train")
    texts = [decode(t) for t in records.tokens]
    batch = training_data(records, [50], **OPTIONS).train_batch(0)
    for ids, target in zip(batch["ids"], batch["targets"], strict=True):
        window = decode(ids.numpy().astype(np.uint8))
        assert [records.labels[i] for i, text in enumerate(texts) if window in text] == [target]


def test_augmentation_turns_about_half_of_the_windows(long_folder):
    records = load_labelled(long_folder, split="train")
    text = " ".join(decode(t) for t in records.tokens)
    other = " ".join(decode(reverse_complement(t)) for t in records.tokens)
    data = training_data(records, [50], **{**OPTIONS, "augment": Augmentation()})
    windows = [decode(ids.numpy().astype(np.uint8)) for step in range(25) for ids in data.train_batch(step)["ids"]]
    turned = [window in other for window in windows]
    assert turned == [window not in text for window in windows]
    assert 0.3 < np.mean(turned) < 0.7


def test_mutations_replace_the_asked_part_of_the_bases_by_others_and_leave_the_data_alone():
    before = encode(b"ACGTN" * 4000)
    given, rng = before.copy(), np.random.default_rng(0)
    after, short = Augmentation(reverse_complement=False, mutation_rate=0.1)([given, given[:7]], rng)
    assert len(short) == 7
    assert np.array_equal(given, before)
    bases, changed = before != N, after != before
    assert not changed[~bases].any()
    assert set(after[changed].tolist()) == set(range(A, T + 1))
    assert stats.binomtest(int(changed.sum()), int(bases.sum()), 0.1).pvalue > 1e-4
    kinds = np.unique(np.stack([before[changed], after[changed]]), axis=1, return_counts=True)[1]
    assert len(kinds) == 12  # each of the other three
    assert stats.chisquare(kinds).pvalue > 1e-4


def sequences_of(batch):
    """The sequences of a padded or packed batch as texts, and their labels."""
    if "seq_idx" not in batch:
        rows = zip(batch["ids"], batch["lengths"], strict=True)
        return [decode(ids[:n].numpy().astype(np.uint8)) for ids, n in rows], batch["targets"].tolist()
    texts, labels = [], []
    for ids, length, seq_idx, targets in zip(
        *(batch[k] for k in ("ids", "lengths", "seq_idx", "targets")), strict=True
    ):
        for number in range(int(seq_idx[:length].max()) + 1):
            texts.append(decode(ids[:length][seq_idx[:length] == number].numpy().astype(np.uint8)))
            labels.append(int(targets[number]))
        assert (targets[number + 1 :] == -100).all()
    return texts, labels


@pytest.mark.parametrize("packed", [False, True])
def test_each_pass_shows_every_training_record_once_with_its_label(short_table, packed):
    data = training_data(load_labelled(short_table), [], **{**OPTIONS, "batch_tokens": 160}, packed=packed)
    assert len(data.training) == 48
    expected = sorted((decode(data.records.tokens[i]), int(data.records.labels[i])) for i in data.training)
    passes = []
    for a_pass in (0, 1):
        batches = [data.train_batch(a_pass * data.batches_per_pass + i) for i in range(data.batches_per_pass)]
        assert all(batch["ids"].numel() <= 160 for batch in batches)
        assert sorted(pair for batch in batches for pair in zip(*sequences_of(batch), strict=True)) == expected
        passes.append([sequences_of(batch)[0] for batch in batches])
    assert passes[0] != passes[1]


def test_packed_records_are_cut_and_turned_like_any(short_table):
    options = {**OPTIONS, "batch_tokens": 160, "augment": Augmentation()}
    data = training_data(load_labelled(short_table), [10, 20], **options, packed=True)
    whole = [decode(tokens) for tokens in data.records.tokens]
    either = " ".join(whole + [decode(reverse_complement(tokens)) for tokens in data.records.tokens])
    texts = [text for step in range(20) for text in sequences_of(data.train_batch(step))[0]]
    assert all(text in either for text in texts)
    assert {len(text) for text in texts if len(text) >= 10} >= {10, 20}
    assert max(map(len, texts)) == 20
    assert all(data.tokens(n) == data.train_batch(n)["lengths"].sum() for n in range(10))


def test_the_number_of_bases_of_a_batch_is_known_without_reading_it(data):
    data = data()
    for step in (0, 3, 17, 40):
        assert data.tokens(step) == data.train_batch(step)["lengths"].sum()


def test_packed_windows_are_refused(long_folder):
    with pytest.raises(InputError, match="windows of long records are of one length per batch and need no packing"):
        training_data(load_labelled(long_folder, split="train"), [20], **OPTIONS, packed=True)


def test_each_class_gives_the_same_part_to_validation(short_table):
    data = training_data(load_labelled(short_table), [], **OPTIONS)
    assert np.bincount(data.held_out.labels).tolist() == [4, 4, 4]
    trained = [data.records.names[i] for i in data.training]
    assert len(trained) + len(data.held_out.names) == len(set(trained) | set(data.held_out.names)) == 60


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([450], {}, "class 'a' has no validation stretch of 450 bases"),
        ([20], {"validation_fraction": 0.0}, "validation_fraction is 0.0"),
        ([20], {"validation_fraction": 1.5}, "validation_fraction is 1.5"),
    ],
)
def test_impossible_windows_are_told(long_folder, lengths, options, message):
    with pytest.raises(InputError, match=message):
        training_data(load_labelled(long_folder, split="train"), lengths, **{**OPTIONS, **options})


def test_one_class_cannot_be_trained(tmp_path):
    (tmp_path / "x.csv").write_text("sequence,label\nACGT,0\nACCT,0\n")
    with pytest.raises(InputError, match="one class only"):
        training_data(load_labelled(tmp_path / "x.csv"), [], **OPTIONS)


@pytest.mark.parametrize(("overlap", "length", "count"), [(False, 100, 6), (False, 400, 50), (True, 400, 50)])
def test_windows_are_balanced_and_lie_inside_one_record(long_folder, overlap, length, count):
    records = load_labelled(long_folder, split="train")
    stretches = [Stretch(i, 0, len(t)) for i, t in enumerate(records.tokens)]
    windows, labels = taken(records, spaced_windows(records, stretches, length, count, overlap=overlap))
    room = 5  # class a has 2000 bases, class b 1000 + 1500: side by side, 5 windows of 400 fit into each
    assert np.bincount(labels).tolist() == [count if overlap or length == 100 else room] * 3
    texts = [decode(t) for t in records.tokens]
    places = [next((i, text.find(decode(w))) for i, text in enumerate(texts) if decode(w) in text) for w in windows]
    assert [records.labels[i] for i, _ in places] == labels.tolist()
    assert len(set(places)) == len(places)
    if not overlap:
        assert all(place % length == 0 for _, place in places)


def test_encode_is_what_the_records_hold(short_table):
    first = short_table.read_text().splitlines()[1].split(",")[0]
    assert np.array_equal(load_labelled(short_table).tokens[0], encode(first.encode()))


def test_a_table_as_pandas_writes_it_and_empty_lines_change_no_row(tmp_path):
    (tmp_path / "x.csv").write_text(",sequence,label\n7,ACGT,a\n\n3,ACGG,b \n,,\n\n")
    records = load_labelled(tmp_path / "x.csv")
    assert (records.names, records.classes) == (["row_2", "row_4"], ("a", "b"))
    assert [decode(tokens) for tokens in records.tokens] == ["ACGT", "ACGG"]
    (tmp_path / "x.csv").write_text("\nsequence,label\rACGT,a\r")
    assert load_labelled(tmp_path / "x.csv").names == ["row_3"]


def test_quotes_in_tables_lose_no_row(tmp_path):
    (tmp_path / "r.tsv").write_text('"sequence"\t"label"\n"ACGT"\t"a"\n"ACGG"\t"b"\n')  # as R writes it
    records = load_labelled(tmp_path / "r.tsv")
    assert (records.names, records.classes) == (["row_2", "row_3"], ("a", "b"))
    (tmp_path / "x.csv").write_text('sequence,label,1"x\nACGT,0,x\nACGG,1,x\nACCC"\nACTT,1,x\n')
    with pytest.raises(InputError, match="line 4 has 1 columns"):
        load_labelled(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text('sequence,label\n"ACGT,0\nACGG,1\n')
    with pytest.raises(InputError, match="line 2 is not a row of a table"):
        load_labelled(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text('sequence,label,x\nACGT,0,"\nACGG,1,x\nACGC,0,"\nACTT,1,x\n')
    with pytest.raises(InputError, match="line 2: a cell in quotes goes on to line 4 and holds what looks like rows"):
        load_labelled(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text('sequence,label,note\nACGT,0,"two\nlines, together"\nACGG,1,x\n')
    assert load_labelled(tmp_path / "x.csv").names == ["row_2", "row_4"]
