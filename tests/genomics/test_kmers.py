"""The k-mer regression: its counts, its reading in chunks and on both strands, its fit, its files."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import seqmodels
from seqmodels import presets
from seqmodels.checkpoint import format_of
from seqmodels.config import ConvConfig
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.classify import classify
from seqmodels.tasks.genomics.evaluate import evaluate
from seqmodels.tasks.genomics.kmers import FORMAT, complement_of_words, frequencies, load_kmers
from seqmodels.tasks.genomics.labelled import load_labelled
from seqmodels.tasks.genomics.tokens import encode, pad_right, reverse_complement
from seqmodels.tasks.genomics.train import train
from seqmodels.training import TrainingConfig


def sequences(n, seed, motif="GATTACA"):
    """Sequences of 30 to 60 bases, every second one with a motif on a strand by chance."""
    rng = np.random.default_rng(seed)
    result = []
    for i in range(n):
        bases = list(rng.choice(list("ACGT"), int(rng.integers(30, 60))))
        if i % 2:
            word = motif if rng.random() < 0.5 else motif[::-1].translate(str.maketrans("ACGT", "TGCA"))
            bases[10 : 10 + len(word)] = word
        result.append(("".join(bases), "with" if i % 2 else "without"))
    return result


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed, (split, n) in enumerate((("train", 400), ("dev", 100), ("test", 100))):
        rows = "\n".join(f"{s},{label}" for s, label in sequences(n, seed))
        (folder / f"{split}.csv").write_text(f"sequence,label\n{rows}\n")
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train(data, folder, baseline="kmer", test=True) == 0
    return folder


def test_frequencies_are_those_of_scikit_learns_counts():
    texts = [s for s, _ in sequences(20, 3)] + ["AC", "ACGTNACGNNNTTT"]
    found = frequencies([encode(s.encode()) for s in texts], (2, 4), False).toarray()
    for k, columns in ((2, slice(0, 16)), (4, slice(16, 272))):
        words = ["".join("ACGT"[w // 4**j % 4] for j in range(k - 1, -1, -1)) for w in range(4**k)]
        counts = CountVectorizer(analyzer="char", ngram_range=(k, k), lowercase=False, vocabulary=words)
        expected = counts.fit_transform(texts).toarray()  # words with N are not in the vocabulary
        expected = expected / np.maximum(expected.sum(1, keepdims=True), 1)
        np.testing.assert_allclose(found[:, columns], expected, atol=1e-12)


def test_the_complement_of_words_is_that_of_their_bases():
    for k in (1, 3, 4):
        words = np.arange(4**k)
        letters = np.stack([words // 4**j % 4 for j in range(k - 1, -1, -1)], 1).astype(np.uint8) + 7
        turned = reverse_complement(letters) - 7
        assert complement_of_words(k).tolist() == (turned * 4 ** np.arange(k - 1, -1, -1)).sum(1).tolist()


def test_the_model_is_scikit_learns_on_the_chosen_strength_and_strands(data, run):
    record = json.loads((run / "model" / "config.json").read_text())["model"]
    own, dev = (load_labelled(data, split=split) for split in ("train", "dev"))
    lengths, both = tuple(record["lengths"]), record["both_strands"]
    assert lengths == (3, 4, 5, 6, 7)
    assert both  # the motif is on either strand
    x, x_dev = (frequencies(r.tokens, lengths, both) for r in (own, dev))
    largest = np.maximum(x.max(axis=0).toarray().ravel(), 1e-12)
    fitted = LogisticRegression(C=record["strength"], tol=1e-8, max_iter=5000).fit(x.multiply(1 / largest), own.labels)
    expected = fitted.predict_proba(x_dev.multiply(1 / largest))
    model = load_kmers(run / "model")
    ids, sizes = (torch.from_numpy(a) for a in pad_right(dev.tokens))
    torch.testing.assert_close(
        model(ids, lengths=sizes).softmax(-1).numpy(), expected.astype(np.float32), rtol=0, atol=0.01
    )
    loss = -np.log(expected[np.arange(len(dev.names)), dev.labels]).mean()
    assert loss == pytest.approx(record["validation_loss"], abs=0.01)


def test_chunks_padding_and_the_other_strand_give_the_same_answer(run):
    model = load_kmers(run / "model").double()
    ids = torch.from_numpy(np.stack([encode(b"ACGTTGCANGATTACATTGA"), encode(b"TTGACCAGTAGGGATTACAG")])).long()
    sizes = torch.tensor([20, 13])
    whole = model(ids, lengths=sizes)
    torch.testing.assert_close(whole[1:], model(ids[1:, :13]))
    state = None
    for start, stop in ((0, 2), (2, 9), (9, 10), (10, 20)):
        state = model.read(ids[:, start:stop], state, lengths=(sizes - start).clamp(0, stop - start))
    torch.testing.assert_close(model.classify(state), whole)
    other = torch.from_numpy(reverse_complement(ids.numpy().astype(np.uint8)).copy()).long()
    torch.testing.assert_close(model(other), model(ids))


def test_the_same_commands_serve_it(data, run, tmp_path, capsys):
    results = json.loads((run / "results.json").read_text())
    rows = {(row["measured on"], row["metric"]): row["mean"] for row in results["summary"]}
    assert rows["test", "accuracy"] > 0.8
    assert evaluate(str(run / "model"), data, resamples=0, device="cpu", output=tmp_path / "e.json") == 0
    found = json.loads((tmp_path / "e.json").read_text())["results"][0]["metrics"]
    assert found["mcc"]["value"] == pytest.approx(rows["test", "mcc"])
    (tmp_path / "x.fa").write_text(">with\n" + "GATTACA" * 3 + "\n>short\nAC\n")
    assert classify([tmp_path / "x.fa"], str(run / "model"), tmp_path / "o.csv", device="cpu") == 0
    assert next(csv.DictReader((tmp_path / "o.csv").read_text().splitlines()))["label"] == "with"


@pytest.mark.parametrize("kind", ["multi", "regression"])
def test_labels_and_numbers_have_a_baseline_too(kind, tmp_path):
    rows = ["sequence,label_a,label_b"]
    for i, (s, label) in enumerate(sequences(200, 5)):
        there = float(label == "with")
        rows.append(
            f"{s},{there},1" if kind == "multi" else f"{s},{10 + s.count('A') / len(s)},{'' if i % 3 else there}"
        )
    (tmp_path / "x.csv").write_text("\n".join(rows) + "\n")
    assert train(tmp_path / "x.csv", tmp_path / "run", baseline="kmer", targets=kind, kmer=4, folds=2) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {(row["measured on"], row["metric"]): row["mean"] for row in results["summary"]}
    assert rows["fold", "auroc" if kind == "multi" else "pearson"] > 0.5
    assert len(results["models"]) == 2


def test_the_convolutional_baseline_is_trained_by_the_same_command(data, tmp_path, one_thread):
    options = {"d_model": 16, "n_layer": 2, "batch_tokens": 4000, "strands": "conjoined", "epochs": 3, "test": True}
    training = TrainingConfig(device="cpu", learning_rate=1e-2)
    assert train(data, tmp_path / "run", baseline="cnn", pool="max", **options, training=training) == 0
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["summary"]
    measured = {(row["measured on"], row["metric"]): row["mean"] for row in rows}
    assert measured["test", "accuracy"] > 0.6
    config = seqmodels.load(tmp_path / "run" / "model").config
    assert config.backbone.layers == (ConvConfig(), ConvConfig())
    million = seqmodels.build(dataclasses.replace(config, backbone=presets.cnn()))
    assert 0.9e6 < sum(p.numel() for p in million.parameters()) < 1.1e6


def test_bad_words_and_folders_are_told(data, run, tmp_path):
    with pytest.raises(InputError, match="words of 1 to 8 bases"):
        train(data, tmp_path / "run", baseline="kmer", kmer=9)
    with pytest.raises(InputError, match="leave --mixer and --start-from out"):
        train(data, tmp_path / "run", baseline="kmer", mixer="lstm")
    with pytest.raises(InputError, match="is already here"):
        train(data, run, baseline="kmer")
    assert format_of(tmp_path) is None
    (tmp_path / "config.json").write_text('{"format": "longseq-kmers-1", "model": {"labels": []}}')
    assert format_of(tmp_path) == FORMAT
    with pytest.raises(InputError, match="not a whole k-mer model"):
        load_kmers(tmp_path)
