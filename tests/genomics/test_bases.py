"""Models that label bases: batches, training, evaluation against scikit-learn, segments and tracks."""

import csv
import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

import seqmodels
from seqmodels import presets
from seqmodels.config import HeadConfig, ModelConfig, StrandsConfig
from seqmodels.errors import InputError
from seqmodels.tasks.genomics import evaluate_bases
from seqmodels.tasks.genomics.bases import BaseData, cut_validation, load_bases, split_bases
from seqmodels.tasks.genomics.classify import classify
from seqmodels.tasks.genomics.datasets import Augmentation
from seqmodels.tasks.genomics.evaluate import evaluate
from seqmodels.tasks.genomics.evaluate_bases import BaseTally
from seqmodels.tasks.genomics.inference import BaseClassifier, probabilities
from seqmodels.tasks.genomics.tokens import COMPLEMENT_MAP, TOKENIZER, decode, encode, reverse_complement
from seqmodels.tasks.genomics.train import train
from seqmodels.training import TrainingConfig

CLASSES = ("a+", "a-", "background")
TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
pytestmark = pytest.mark.usefixtures("one_thread")


def planted(n, seed):
    """n bases, and (start, end, strand) of the planted ones: stretches of C and A, of G and T on the minus strand."""
    rng = np.random.default_rng(seed)
    bases, places, at = list(rng.choice(list("ACGT"), n)), [], 20
    while at + 80 < n:
        length, strand = int(rng.integers(20, 60)), "+-"[int(rng.integers(2))]
        bases[at : at + length] = rng.choice(list("CA" if strand == "+" else "GT"), length)
        places.append((at, at + length, strand))
        at += length + int(rng.integers(20, 60))
    bases[5] = "N"
    return "".join(bases), places


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    """A FASTA of two records, and a BED file of what is planted in them."""
    folder = tmp_path_factory.mktemp("genome")
    records = {"one": planted(6000, 0), "two": planted(2000, 1)}
    (folder / "g.fa").write_text("".join(f">{name}\n{text}\n" for name, (text, _) in records.items()))
    lines = [f"{name}\t{a}\t{b}\tx\t0\t{s}\n" for name, (_, places) in records.items() for a, b, s in places]
    (folder / "g.bed").write_text("".join(lines))
    return folder / "g.fa", folder / "g.bed"


def training(**changes):
    return TrainingConfig(**{"max_steps": 40, "validate_every": 40, "learning_rate": 1e-2, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def run(genome, tmp_path_factory):
    """A model of both strands that has learnt the planted pattern with its strand."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "run"
    code = train(
        genome[0], folder, annotation=[genome[1]], features="gene", stranded=True, leave_out="two", window="200",
        batch_tokens=1600, d_model=32, n_layer=1, d_state=8, bidirectional=True, strands="equivariant", test=True,
        training=training(),
    )  # fmt: skip
    assert code == 0
    return folder


def test_a_planted_pattern_and_its_strand_are_learnt(run):
    results = json.loads((run / "results.json").read_text())
    assert results["classes"] == ["background", "gene+", "gene-"]
    (measured,) = results["models"][0]["results"]["test"]
    assert measured["n"] == 1999  # all of two but its N
    assert all(measured["metrics"][f"{name} f1"]["value"] > 0.8 for name in results["classes"])
    assert {row["metric"] for row in results["summary"]} >= {"accuracy", "mcc", "gene+ f1", "gene- auroc"}


def test_evaluation_and_its_pictures_are_those_of_scikit_learn_on_every_base(
    run, genome, tmp_path, capsys, monkeypatch
):
    arguments = {"data": genome[0], "annotation": [genome[1]], "region": ["two,one:1-1,500"], "device": "cpu"}
    drawn, draw = [], evaluate_bases.draw_curves
    monkeypatch.setattr(evaluate_bases, "draw_curves", lambda *given: (drawn.append(given), draw(*given)))
    options = {"output": tmp_path / "e.json", "pictures": tmp_path / "e", "picture_format": "svg"}
    assert evaluate(str(run / "model"), **arguments, **options) == 0
    names = {"roc.svg", "precision-recall.svg", "calibration.svg", "confusion.svg"}
    assert {path.name for path in (tmp_path / "e").iterdir()} == names
    ((_, columns, confusion, title, unit, _),) = drawn
    assert (title, unit) == ("3498 bases", "bases")
    (found,) = json.loads((tmp_path / "e.json").read_text())["results"]
    records = load_bases(genome[0], [genome[1]], "gene", stranded=True, region="two,one:1-1,500")
    assert records.names == ["two:1-2000", "one:1-1500"]
    classifier = BaseClassifier(str(run / "model"), "cpu")
    tokens, labels = zip(*map(records.of, records.stretches), strict=True)
    scores, labels = probabilities(np.concatenate(classifier.batch(list(tokens)))), np.concatenate(labels)
    scores, labels = scores[labels >= 0], labels[labels >= 0]
    said, values = scores.argmax(1), {name: value["value"] for name, value in found["metrics"].items()}
    assert found["confusion"] == confusion.tolist() == sk.confusion_matrix(labels, said).tolist()
    assert values["accuracy"] == pytest.approx(sk.accuracy_score(labels, said))
    assert values["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(labels, said))
    assert values["macro_f1"] == pytest.approx(sk.f1_score(labels, said, average="macro"))
    assert values["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, said))
    for i, name in enumerate(classifier.classes):
        true, claimed = labels == i, said == i
        for metric, of in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score),
                           ("mcc", sk.matthews_corrcoef)):  # fmt: skip
            assert values[f"{name} {metric}"] == pytest.approx(of(true, claimed))
        assert values[f"{name} auroc"] == pytest.approx(sk.roc_auc_score(true, scores[:, i]), abs=1e-5)
        assert found["bases"][name] == true.sum()
        drawn_of = columns[i]
        assert (drawn_of.name, drawn_of.counts[drawn_of.true].sum()) == (name, true.sum())
        for area in (sk.roc_auc_score, sk.average_precision_score):
            shown = area(drawn_of.true, drawn_of.said, sample_weight=drawn_of.counts)
            assert shown == pytest.approx(area(true, scores[:, i]), abs=1e-4)
    assert "gene+" in capsys.readouterr().out


def test_blocks_of_bases_are_resampled_and_chunks_do_not_matter(monkeypatch):
    monkeypatch.setattr("seqmodels.tasks.genomics.evaluate_bases.BLOCK", 50)
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, size=1000)
    labels[labels < 0] = -100
    logits = rng.normal(size=(1000, 2)) + np.eye(2)[labels.clip(min=0)] * np.linspace(0, 3, 1000)[:, None]
    whole, parts = BaseTally(("a", "b")), BaseTally(("a", "b"))
    whole.add(labels, logits)
    for a, b in zip([0, 7, 300], [7, 300, 1000], strict=True):
        parts.add(labels[a:b], logits[a:b])
    assert whole.results() == parts.results()
    known, said = labels[labels >= 0], logits[labels >= 0].argmax(1)
    n = -(-len(known) // 50)
    drawn = []
    for weights in np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=200):
        w = np.repeat(weights, 50)[: len(known)]
        drawn.append(sk.f1_score(known, said, sample_weight=w))
    found = whole.results(resamples=200)["metrics"]["b f1"]
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(drawn, (2.5, 97.5)).tolist())


@pytest.mark.parametrize("stranded", [False, True])
def test_windows_and_their_labels_are_of_either_strand_and_never_of_what_is_held_out(genome, stranded):
    whole = load_bases(genome[0], [genome[1]], "gene", stranded=stranded)
    splits = split_bases(whole, "one:2,001-3,000", "two")
    assert [split.names for split in splits.values()] == [["one:1-2000", "one:3001-6000"], ["one:2001-3000"],
                                                          ["two:1-2000"]]  # fmt: skip
    weights = (1.0, 3.0, 5.0)[: len(whole.classes)]
    data = BaseData(
        splits["train"], splits["dev"], 100, batch_tokens=1000, validation_windows=5, augment=Augmentation(), seed=0,
        class_weights=weights,
    )  # fmt: skip
    text = decode(whole.genome.bases(0, 0, 6000))
    other = decode(reverse_complement(encode(text.encode())))
    plus = whole.labels.of("one", 0, 6000)
    plus[5] = -100  # N
    truth = {text: plus, other: whole.labels.turned(plus)}
    seen = set()
    for number in range(3):
        batch = data.train_batch(number)
        assert all(torch.equal(batch[name], again) for name, again in data.train_batch(number).items())
        for ids, targets, weighed in zip(*(batch[n].numpy() for n in ("ids", "targets", "weights")), strict=True):
            window = decode(ids.astype(np.uint8))
            strand = text if window in text else other
            at = strand.index(window)
            np.testing.assert_array_equal(targets, truth[strand][at : at + 100])
            np.testing.assert_array_equal(weighed[targets >= 0], np.array(weights)[targets[targets >= 0]])
            start = at if strand == text else 6000 - at - 100
            assert start + 100 <= 2000 or start >= 3000
            seen.add(strand)
    assert len(seen) == 2
    (validation,) = data.validation_batches()
    assert decode(validation["ids"][0].numpy().astype(np.uint8)) == text[2000:2100]
    np.testing.assert_array_equal(validation["targets"][0].numpy(), plus[2000:2100])
    kept, held = cut_validation(whole, 0.25, seed=3)
    assert (kept.bases, held.bases) == (6000, 2000)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_labels_of_one_strand_are_exchanged_with_their_complements_on_the_other(training):
    strands = StrandsConfig(complement_map=COMPLEMENT_MAP, training=training)
    backbone = dataclasses.replace(presets.mamba2(16, 2, d_state=8, head_dim=16, bidirectional=True), strands=strands)
    head = HeadConfig(task="position", labels=("a+", "a-", "b"), complement=(1, 0, 2))
    config = ModelConfig(vocab_size=16, backbone=backbone, head=head, tokenizer=TOKENIZER)
    model = seqmodels.build(config, seed=0).double().eval()
    torch.nn.init.normal_(model.score.bias)
    ids = torch.randint(7, 12, (2, 50), generator=torch.Generator().manual_seed(0))
    other = torch.tensor(COMPLEMENT_MAP)[ids.flip(1)]
    logits = model(ids)[0]
    assert (logits[..., 0] - logits[..., 1]).abs().max() > 1e-3
    torch.testing.assert_close(model(other)[0], logits.flip(1)[..., [1, 0, 2]], rtol=1e-9, atol=1e-10)
    plain = seqmodels.build(dataclasses.replace(config, backbone=dataclasses.replace(backbone, strands=None)), seed=0)
    plain = plain.double().eval()
    plain.load_state_dict(model.state_dict())
    mean = (plain(ids)[0] + plain(other)[0].flip(1)[..., [1, 0, 2]]) / 2
    torch.testing.assert_close(logits, mean, rtol=1e-9, atol=1e-10)
    targets = torch.randint(0, 3, (2, 50), generator=torch.Generator().manual_seed(1))
    loss, found = model.loss({"ids": ids, "targets": targets, "weights": 1.0 * targets})
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(loss, (each * targets.flatten()).sum() / targets.sum())
    torch.testing.assert_close(found["accuracy"], (logits.argmax(-1) == targets).double().mean(), check_dtype=False)
    with pytest.raises(InputError, match=r"head.complement is \(1, 2, 0\)"):
        seqmodels.build(dataclasses.replace(config, head=dataclasses.replace(head, complement=(1, 2, 0))))


@pytest.fixture(scope="module")
def directed(tmp_path_factory):
    """Models of one strand with random weights, causal and not, that label bases of both strands."""
    folders = {}
    for bidirectional in (False, True):
        backbone = presets.mamba2(16, 2, d_state=8, head_dim=16, bidirectional=bidirectional)
        head = HeadConfig(task="position", labels=CLASSES, complement=(1, 0, 2))
        config = ModelConfig(vocab_size=16, backbone=backbone, head=head, tokenizer=TOKENIZER)
        folder = tmp_path_factory.mktemp("directed")
        model = seqmodels.build(config, seed=1)
        torch.nn.init.normal_(model.score.weight)
        folders[bidirectional] = str(seqmodels.save(model, folder))
    return folders


def read_bedgraph(path, lengths):
    values = {seq: np.full(n, np.nan) for seq, n in lengths.items()}
    before = ("", 0)
    for line in path.read_text().splitlines():
        seq, start, end, value = line.split("\t")
        assert (seq, int(start)) >= before  # sorted, and none over another
        assert np.isnan(values[seq][int(start) : int(end)]).all()
        values[seq][int(start) : int(end)] = float(value)
        before = (seq, int(end))
    return values


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.mark.parametrize(("bidirectional", "strand"), [(False, "fwd"), (True, "fwd"), (True, "rev"), (False, "both")])
def test_tracks_and_segments_are_the_models_probabilities_read_whole_or_in_parts(
    directed, tmp_path, bidirectional, strand
):
    model = seqmodels.load(directed[bidirectional])
    records = {"one": planted(900, 0)[0], "two": planted(400, 1)[0]}
    (tmp_path / "g.fa").write_text("".join(f">{name}\n{text}\n" for name, text in records.items()))
    truth = {}
    for name, text in records.items():
        tokens = encode(text.encode())
        found = []
        for other in {"fwd": [False], "rev": [True], "both": [False, True]}[strand]:
            ids = torch.from_numpy((reverse_complement(tokens) if other else tokens).astype(np.int64))[None]
            logits = model(ids)[0][0].detach().numpy()
            found.append(logits[::-1, [1, 0, 2]] if other else logits)
        truth[name] = probabilities(np.mean(found, axis=0))
    for size in ("whole", "parts"):
        parts = {"batch_tokens": 300, "chunk": 100} if size == "parts" else {}
        out = tmp_path / f"{size}.tsv"
        asked = {"model": directed[bidirectional], "strand": strand, "device": "cpu", **parts}
        assert classify([tmp_path / "g.fa"], output=out, track=tmp_path / size, **asked) == 0
        lengths = {name: len(text) for name, text in records.items()}
        tracks = [read_bedgraph(tmp_path / f"{size}.{name}.bedgraph", lengths) for name in CLASSES]
        rows = rows_of(out)
        assert {row["reading"] for row in rows} == {
            "whole" if size == "whole" else "two-sweeps" if bidirectional else "chunks"
        }
        for name, want in truth.items():
            np.testing.assert_allclose(np.stack([track[name] for track in tracks], 1), want, atol=6e-5)
            own = [row for row in rows if row["seq"] == name]
            places = [(int(row["start"]), int(row["end"])) for row in own]
            assert places[0][0] == 0
            assert places[-1][1] == len(want)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(places))
            assert all(a["label"] != b["label"] for a, b in itertools.pairwise(own))
            for row, (start, end) in zip(own, places, strict=True):
                means = dict(zip(CLASSES, want[start:end].mean(0), strict=True))
                assert float(row["prob"]) == pytest.approx(means[row["label"]], abs=1.01e-4)
                assert [float(row[f"p_{c}"]) for c in means] == pytest.approx(list(means.values()), abs=1.01e-4)
                chosen = want[start:end, CLASSES.index(row["label"])]
                assert (want[start:end].max(1) - chosen).max() < 2e-4
        shown = (tmp_path / f"{size}.labels.bed").read_text().splitlines()
        said = [[row["seq"], row["start"], row["end"], row["label"]] for row in rows]
        assert sorted(line.split("\t")[:4] for line in shown) == sorted(said)


def test_intervals_on_the_minus_strand_are_read_there_and_told_where_they_are(directed, genome, tmp_path):
    (tmp_path / "x.bed").write_text("two\t100\t400\tleft\t0\t-\ntwo\t300\t500\tright\t0\t+\ntwo\t1900\t2100\tend\n")
    options = {"model": directed[True], "bed": tmp_path / "x.bed", "device": "cpu"}
    assert classify([genome[0]], **options, output=tmp_path / "o.tsv", track=tmp_path / "t") == 0
    text = planted(2000, 1)[0]
    ids = torch.from_numpy(reverse_complement(encode(text[100:400].encode())).astype(np.int64))[None]
    want = probabilities(seqmodels.load(directed[True])(ids)[0][0].detach().numpy())[::-1, [1, 0, 2]]
    rows = [row for row in rows_of(tmp_path / "o.tsv") if row["name"] == "left"]
    assert (rows[0]["start"], rows[-1]["end"]) == ("100", "400")
    for row in rows:
        start, end = int(row["start"]) - 100, int(row["end"]) - 100
        assert [float(row[f"p_{c}"]) for c in CLASSES] == pytest.approx(want[start:end].mean(0), abs=1.01e-4)
    track = read_bedgraph(tmp_path / "t.background.bedgraph", {"two": 2000})["two"]
    np.testing.assert_allclose(track[100:400], want[:, 2], atol=1.01e-4)
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(track)), [*range(100, 500), *range(1900, 2000)])


def test_records_that_cannot_be_read_get_a_row_and_no_track(directed, tmp_path, capsys):
    (tmp_path / "x.fa").write_text(f">bad\n{'ACGT' * 300}!ACG\n>empty\n>n\nNNNN\n>good\nACGTACGTAA\n")
    for size in ({}, {"batch_tokens": 200, "chunk": 100}):
        assert classify([tmp_path / "x.fa"], model=directed[False], output=tmp_path / "o.tsv", track=tmp_path / "t",
                        device="cpu", **size) == 2  # fmt: skip
        rows = rows_of(tmp_path / "o.tsv")
        assert [(r["seq"], r["status"]) for r in rows[:3]] == [("bad", "invalid"), ("empty", "empty"), ("n", "only_n")]
        assert {(r["seq"], r["status"]) for r in rows[3:]} == {("good", "ok")}
        assert {line.split("\t")[0] for line in (tmp_path / "t.background.bedgraph").read_text().splitlines()} == {
            "good"
        }
    assert "'!' at position 1201" in rows[0]["note"]
    assert "are not ok (1 empty, 1 invalid, 1 only_n)" in capsys.readouterr().err


def test_where_memory_is_short_a_record_is_read_in_windows_or_said_to_be_too_long(directed, tmp_path, monkeypatch):
    monkeypatch.setattr("seqmodels.tasks.genomics.inference.free_memory", lambda: 0)
    text = planted(1000, 0)[0]
    (tmp_path / "x.fa").write_text(f">long\n{text}\n>short\n{text[:100]}\n")
    options = {"model": directed[True], "device": "cpu", "batch_tokens": 400, "chunk": 100, "overlap": 150}
    assert classify([tmp_path / "x.fa"], **options, output=tmp_path / "w.tsv") == 0
    rows = [row for row in rows_of(tmp_path / "w.tsv") if row["seq"] == "long"]
    assert {row["reading"] for row in rows} == {"windows"}
    assert [int(row["end"]) for row in rows[:-1]] == [int(row["start"]) for row in rows[1:]]
    assert rows[-1]["end"] == "1000"
    assert classify([tmp_path / "x.fa"], **options, reading="two-sweeps", output=tmp_path / "s.tsv") == 2
    rows = rows_of(tmp_path / "s.tsv")
    assert [(rows[0]["seq"], rows[0]["status"], rows[0]["label"])] == [("long", "too_long", "")]
    assert {row["status"] for row in rows[1:]} == {"ok"}


@pytest.fixture
def pieces(tmp_path):
    """Records that are read in batches and in chunks, bad ones, one name twice; and intervals that touch each other."""
    texts = [planted(n, i)[0] for i, n in enumerate((300, 90, 120, 260, 100))]
    names = ["a", "b", "c", "d", "b again"]
    records = [f">{name}\n{text}\n" for name, text in zip(names, texts, strict=True)]
    records[2:2] = [">empty\n", ">bad\nACGT!\n", f">long_and_bad\n{'ACGT' * 60}!\n"]
    (tmp_path / "x.fa").write_text("".join(records))
    (tmp_path / "y.fa").write_text("".join(records[:2]))
    places = ["a\t0\t100", "a\t100\t300", "nowhere\t0\t9", "a\t40\t300", "b\t0\t50", "b\t50\t90"]
    (tmp_path / "x.bed").write_text("".join(f"{place}\tname\t0\t{'+-'[i % 2]}\n" for i, place in enumerate(places)))
    return tmp_path / "x.fa", {"bed": tmp_path / "x.bed"}


@pytest.mark.parametrize("of", ["records", "intervals"])
def test_segments_stopped_in_or_between_records_go_on_to_the_same_bytes(directed, pieces, tmp_path, of, monkeypatch):
    options = {"model": directed[False], "device": "cpu", "batch_tokens": 60, "chunk": 150, "strand": "both"}
    path = pieces[0] if of == "records" else tmp_path / "y.fa"
    options |= pieces[1] if of == "intervals" else {}
    assert classify([path], output=tmp_path / "whole.tsv", **options) == 2
    lines = (tmp_path / "whole.tsv").read_bytes().splitlines(keepends=True)
    table, read, asked = tmp_path / "o.tsv", BaseClassifier.read, []
    monkeypatch.setattr(BaseClassifier, "read", lambda self, *given: asked.append(1) or read(self, *given))
    counts, places = [], [line.split(b"\t")[:3] for line in lines]  # seq, start, end
    firsts = [i for i in range(2, len(lines)) if places[i][1] != places[i - 1][2]]  # rows of another record
    for row in sorted(
        {1, *firsts, *(i - 1 for i in firsts[::2]), *(i + 1 for i in firsts[1::2])} & {*range(len(lines))}
    ):
        (tmp_path / "o.tsv.part").write_bytes(b"".join(lines[:row]) + lines[row][:9])
        shutil.copy(tmp_path / "whole.tsv.json", tmp_path / "o.tsv.part.json")
        asked.clear()
        assert classify([path], output=table, resume=True, **options) == 2
        assert table.read_bytes() == b"".join(lines)
        counts.append(len(asked))
        table.unlink()
    assert counts == sorted(counts, reverse=True)  # the more is kept, the less is read
    assert counts[0] > 1 >= counts[-1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_processes_share_the_records_of_a_model_of_bases(directed, pieces, tmp_path, device):
    options = {"model": directed[True], "device": device, "batch_tokens": 110, "chunk": 50, "strand": "both"}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        assert classify([pieces[0]], output=folder / "o.tsv", track=folder / "t", devices=devices, **options) == 2
        (folder / "o.tsv.json").unlink()
    one, two = ({path.name: path.read_bytes() for path in sorted((tmp_path / d).iterdir())} for d in "12")
    assert len(one) == 5
    assert one == two


def test_codon_usage_finds_genes_and_is_evaluated_and_classified_like_a_network(tmp_path):
    rng = np.random.default_rng(0)
    codons = [a + b + c for a in "ACGT" for b in "ACGT" for c in "ACGT" if a + b + c not in ("TAA", "TAG", "TGA")]
    usage = rng.dirichlet(np.full(61, 0.5))
    text, lines, at = "", [], 0
    for i in range(60):
        gene = "ATG" + "".join(rng.choice(codons, 150, p=usage)) + "TAA"
        gene = gene if i % 2 else gene[::-1].translate(str.maketrans("ACGT", "TGCA"))
        space = "".join(rng.choice(list("ACGT"), 300))
        lines.append(f"g\tx\tCDS\t{at + 301}\t{at + 300 + len(gene)}\t.\t{'-+'[i % 2]}\t0\tID=c{i}\n")
        text += space + gene
        at = len(text)
    (tmp_path / "g.fa").write_text(f">g\n{text}\n")
    (tmp_path / "g.gff3").write_text("".join(lines))
    third = at // 3
    code = train(
        tmp_path / "g.fa", tmp_path / "run", annotation=[tmp_path / "g.gff3"], stranded=True, test=True,
        validation=f"g:1-{third}", leave_out=f"g:{third + 1}-{2 * third}", baseline="codons",
    )  # fmt: skip
    assert code == 0
    (found,) = json.loads((tmp_path / "run" / "results.json").read_text())["models"][0]["results"]["test"]
    assert min(found["metrics"][f"CDS{s} f1"]["value"] for s in "+-") > 0.85
    model = str(tmp_path / "run" / "model")
    assert evaluate(model, data=tmp_path / "g.fa", annotation=[tmp_path / "g.gff3"], device="cpu",
                    region=[f"g:{third + 1}-{2 * third}"], output=tmp_path / "e.json") == 0  # fmt: skip
    (again,) = json.loads((tmp_path / "e.json").read_text())["results"]
    assert again["confusion"] == found["confusion"]
    assert classify([tmp_path / "g.fa"], model=model, output=tmp_path / "o.tsv", device="cpu") == 0
    rows = rows_of(tmp_path / "o.tsv")
    assert {row["label"] for row in rows} == {"CDS+", "CDS-", "background"}
    assert sum(int(row["length"]) for row in rows) == len(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"folds": 3}, "--folds does not go with labels of bases; leave out it or --annotation"),
        ({"window": "100,200"}, "with --annotation all windows have one length"),
        ({"test": True}, "--test measures what --leave-out names"),
        ({"leave_out": "three"}, "leave_out names the record 'three', which the genomes do not have; they have one"),
        ({"validation": "one:1-7,000"}, "validation: one:1-7,000 ends beyond one, which has 6000 bases"),
        ({"annotation": None, "stranded": True}, "--stranded is for labels of bases; add --annotation"),
        ({"annotation": None, "baseline": "codons"}, "--baseline codons labels bases; name their --annotation"),
        ({"leave_out": "one,two"}, "no base to train on is CDS"),
    ],
)
def test_what_does_not_go_together_is_told(genome, tmp_path, changes, said):
    with pytest.raises(InputError) as error:
        train(genome[0], tmp_path / "run", **{"annotation": [genome[1]], **changes})
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_models_of_bases_and_of_sequences_are_told_apart(directed, model, genome, tmp_path):
    with pytest.raises(InputError, match="labels bases; name the --annotation"):
        evaluate(directed[False], data=genome[0])
    with pytest.raises(InputError, match="is not a classifier of DNA bases"):
        evaluate(model, data=genome[0], annotation=[genome[1]])
    with pytest.raises(InputError, match="window is for models of whole sequences"):
        classify([genome[0]], model=directed[False], output=tmp_path / "o.tsv", window=100)
    with pytest.raises(InputError, match="tracks of every base are made anew; leave out --resume, or --track"):
        classify([genome[0]], model=directed[False], output=tmp_path / "o.tsv", track=tmp_path / "t", resume=True)
    with pytest.raises(InputError, match="features are CDS, but the model tells a"):
        evaluate(directed[False], data=genome[0], annotation=[genome[1]], features="CDS")
