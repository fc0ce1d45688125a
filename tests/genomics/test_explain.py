"""dna explain: substitutions against reading every changed sequence alone, gradients against relaxed one-hot input."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from Bio.Seq import Seq

import seqmodels
from seqmodels import cli, presets
from seqmodels.config import BackboneConfig, HeadConfig, KmerConfig, ModelConfig, StrandsConfig
from seqmodels.errors import InputError
from seqmodels.tasks.genomics import explain as module
from seqmodels.tasks.genomics.classify import classify
from seqmodels.tasks.genomics.explain import explain
from seqmodels.tasks.genomics.importance import Explainer, importance
from seqmodels.tasks.genomics.inference import load
from seqmodels.tasks.genomics.kmers import KmerModel, KmerModelConfig, save_kmers
from seqmodels.tasks.genomics.logo import Panel, draw
from seqmodels.tasks.genomics.tokens import COMPLEMENT_MAP, TOKENIZER, encode

pytestmark = pytest.mark.usefixtures("one_thread")
KMERS = KmerConfig(k=3, alphabet=(7, 8, 9, 10), width=4)
TEXT = "ACGTTNGCATANC"


def other(text):
    return str(Seq(text).reverse_complement())


def tokens(text):
    return encode(text.encode())


def ids(text):
    return torch.from_numpy(tokens(text).astype(np.int64))[None]


@pytest.fixture(scope="module")
def models(make_model, tmp_path_factory):
    def of(kind, head, kmer=None, strands=None):
        sizes = {"d_state": 8, "head_dim": 16, "chunk_size": 16}
        backbone = {
            "mamba2": presets.mamba2(16, 2, **sizes),
            "both": presets.mamba2(16, 2, bidirectional=True, **sizes),
            "attention": presets.attention(16, 1, num_heads=2),
            "cnn": presets.cnn(16, 2, taps=3),
        }[kind]
        both = strands and StrandsConfig(complement_map=COMPLEMENT_MAP, training=strands == "equivariant")
        backbone = BackboneConfig(**{**vars(backbone), "kmer": kmer, "strands": both})
        return make_model(backbone=backbone, head=head)

    three = HeadConfig(task="sequence", labels=("a", "b", "c"))
    counts = KmerModel(
        KmerModelConfig(lengths=(1, 3), both_strands=False, head=three, tokenizer=TOKENIZER)
    )  # fmt: skip
    counts.weight.normal_(generator=torch.Generator().manual_seed(0))
    folder = save_kmers(counts, tmp_path_factory.mktemp("kmers"), card="", facts={})
    return {
        "causal": of("mamba2", three, KMERS),
        "attention": of("attention", three),
        "both": of("both", HeadConfig(task="sequence", labels=("a", "b"), targets="multi", pool="max")),
        "cnn": of("cnn", HeadConfig(task="sequence", labels=("a", "b"), targets="regression", scale=((1, 2), (0, 3)))),
        "equivariant": of("both", three, KMERS, "equivariant"),
        "conjoined": of("mamba2", three, KMERS, "conjoined"),
        "words": str(folder),
        "next": of("mamba2", HeadConfig(task="next_token"), KMERS),
        "masked": of("both", HeadConfig(task="masked_token")),
        "masked equivariant": of("both", HeadConfig(task="masked_token"), None, "equivariant"),
    }


def explainer_of(model, strand="fwd", **options):
    return Explainer(model, "cpu", "float64", strand=strand, **options)


def said_by(model, text, place=None):
    """Logits, numbers or log-likelihood of a text by the definition; of masked-token models of the base at a place."""
    if model.config.head.task == "sequence":
        return model(ids(text))[0].double()
    given = ids(text)
    if model.config.head.task == "masked_token":
        given[0, place] = 3
        return model(given)[0][0, place, 7:11].log_softmax(-1)["ACGT".index(text[place])][None]
    log_p = model(given)[0][0, :-1, 7:11].log_softmax(-1)
    return sum(row["ACGT".index(base)] for row, base in zip(log_p, text[1:], strict=True) if base != "N")[None]


def scores_by_hand(model, text, strands, place=None):
    """Log-odds (or what stands for them) and probabilities of the mean of the strands."""
    with torch.inference_mode():
        said = torch.stack(
            [said_by(model, other(text), None if place is None else len(text) - 1 - place) if turned else
             said_by(model, text, place) for turned in strands]
        ).mean(0)  # fmt: skip
    head = model.config.head
    if head.task == "sequence" and head.targets == "single":
        p = said.softmax(-1)
        return torch.log(p / (1 - p)).numpy(), p.numpy()
    return said.numpy(), said.sigmoid().numpy() if head.task == "sequence" and head.targets == "multi" else None


KINDS = ["causal", "attention", "both", "cnn", "equivariant", "conjoined", "words", "next", "masked"]


@pytest.mark.parametrize(
    ("kind", "strand", "batch_tokens"),
    [*((kind, "fwd", None) for kind in KINDS), ("causal", "both", 7), ("next", "rev", 25), ("both", "both", 20),
     ("masked", "both", 40), ("words", "rev", 33), ("attention", "both", 100)],
)  # fmt: skip
def test_mutagenesis_is_what_reading_every_changed_sequence_by_itself_gives(models, kind, strand, batch_tokens):
    model = load(models[kind]).double()
    strands = {"fwd": (False,), "rev": (True,), "both": (False, True)}[strand]
    done = []
    found = explainer_of(models[kind], strand, batch_tokens=batch_tokens).mutagenesis(
        tokens(TEXT), 3, 12, advance=done.append
    )
    assert sum(done) == pytest.approx(7)
    assert np.isnan(found.scores).all((1, 2)).tolist() == [base == "N" for base in TEXT[3:12]]
    for i, base in ((i, b) for i, b in enumerate(TEXT[3:12]) if b != "N"):
        before, p_before = scores_by_hand(model, TEXT, strands, i + 3)
        for b, alt in ((b, alt) for b, alt in enumerate("ACGT") if alt != base):
            after, p_after = scores_by_hand(model, TEXT[: i + 3] + alt + TEXT[i + 4 :], strands, i + 3)
            np.testing.assert_allclose(found.scores[i, b], after - before, atol=1e-9)
            if p_after is not None:
                np.testing.assert_allclose(found.chances[i, b], p_after - p_before, atol=1e-9)
        assert not found.scores[i, "ACGT".index(base)].any()
    if kind != "masked":
        np.testing.assert_allclose(found.given, before if p_before is None else p_before, atol=1e-9)


def test_a_model_that_reads_in_one_direction_reads_what_precedes_a_base_once(models, monkeypatch):
    explainer, read = explainer_of(models["causal"], batch_tokens=100), []
    real = explainer.model.read
    monkeypatch.setattr(explainer.model, "read", lambda ids, state: (read.append(ids.numel()), real(ids, state))[1])
    explainer.mutagenesis(tokens("ACGTTGCATA" * 30), 290, 292)
    assert sum(read) == 300 + 290 + 2 * 3 * 10  # as it is, what precedes, and both bases' exchanges to the end
    assert max(read) <= 100


def relaxed(backbone, x, change):
    """What a table gives for x (b, l, 4), any numbers: of each k-mer a row, embedded and changed, summed over all."""
    known, kmer = x.detach().sum(-1, keepdim=True), backbone.kmer
    k = 1 if kmer is None else kmer.k

    def row(base, word):
        return change(backbone.embedding.weight[base] + (0 if kmer is None else kmer.proj(kmer.table.weight[word])))

    padded = torch.cat([x.new_zeros(len(x), k - 1, 4), x], 1)
    total = (1 - known) * row(11, -1)
    whole = torch.stack([padded[:, j : j + x.shape[1]].detach().sum(-1, keepdim=True) for j in range(k)]).prod(0)
    for base in range(4):
        total = total + (1 - whole) * x[..., base, None] * row(7 + base, -1)
    for number, word in enumerate(itertools.product(range(4), repeat=k)):
        share = torch.stack([padded[:, j : j + x.shape[1], base] for j, base in enumerate(word)]).prod(0)
        total = total + share[..., None] * row(7 + word[-1], number)
    return total


class Lookup(torch.nn.Module):
    """In the place of the first norm: what is looked up for x, normalised, and as it is."""

    def __init__(self, backbone, norm):
        super().__init__()
        self.given = [backbone], norm

    def forward(self, *_):
        (backbone,), norm = self.given
        return relaxed(backbone, self.x, lambda e: norm(e, None, False)[0]), relaxed(backbone, self.x, lambda e: e)


@pytest.mark.parametrize(
    ("kind", "strand"),
    [("causal", "both"), ("both", "fwd"), ("cnn", "rev"), ("equivariant", "fwd"), ("conjoined", "fwd"),
     ("next", "both")],
)  # fmt: skip
def test_the_gradient_is_that_of_a_one_hot_sequence_through_single_bases_and_k_mers(models, kind, strand):
    found = explainer_of(models[kind], strand, batch_tokens=50).gradient(tokens(TEXT), 2, 12)
    model = seqmodels.load(models[kind], dtype=torch.float64)
    norm = model.backbone.layers[0].norm = Lookup(model.backbone, model.backbone.layers[0].norm)
    x = torch.nn.functional.one_hot((ids(TEXT) - 7).clamp(0, 4), 5)[..., :4].double().requires_grad_()

    def said(x, text):
        norm.x = torch.cat([x, x.flip(1, 2)]) if model.backbone.both_strands else x
        if model.config.head.task == "sequence":
            return model(ids(text))[0]
        return (x[0, 1:] * model(ids(text))[0][0, :-1, 7:11].log_softmax(-1)).sum()[None]

    readings = {"fwd": (False,), "rev": (True,), "both": (False, True)}[strand]
    mean = sum(said(x.flip(1, 2), other(TEXT)) if turned else said(x, TEXT) for turned in readings) / len(readings)
    if len(mean) == 3:  # a softmax
        mean = torch.stack([mean[i] - mean[[j for j in range(3) if j != i]].logsumexp(0) for i in range(3)])
    for i, value in enumerate(mean):
        (slope,) = torch.autograd.grad(value, x, retain_graph=True)
        centred = (slope - slope.mean(-1, keepdim=True))[0, 2:12].numpy()
        ours = found.scores[..., i] - found.scores[..., i].mean(1, keepdims=True)
        at = [place for place, base in enumerate(TEXT[2:12]) if base != "N"]
        np.testing.assert_allclose(ours[at], centred[at], atol=1e-9)
        own = centred[at, ["ACGT".index(TEXT[2 + place]) for place in at]]
        np.testing.assert_allclose(importance(found.scores)[at, i], own, atol=1e-9)
    assert np.isnan(found.scores).all((1, 2)).tolist() == [base == "N" for base in TEXT[2:12]]


HASHED = KmerConfig(k=5, alphabet=(7, 8, 9, 10), width=4, buckets=31, complement_map=COMPLEMENT_MAP)


@pytest.mark.parametrize(("strand", "kmers"), [("fwd", KMERS), ("both", KMERS), ("rev", HASHED)])
def test_of_a_model_that_is_linear_in_what_it_looks_up_gradient_and_mutagenesis_are_the_same(tmp_path, strand, kmers):
    head = HeadConfig(task="sequence", labels=("a", "b"), targets="multi")
    backbone = BackboneConfig(d_model=8, layers=(), kmer=kmers)
    config = ModelConfig(vocab_size=16, backbone=backbone, head=head, tokenizer=TOKENIZER)
    explainer = explainer_of(str(seqmodels.save(seqmodels.build(config, seed=0), tmp_path)), strand)
    exact, linear = explainer.mutagenesis(tokens(TEXT)), explainer.gradient(tokens(TEXT))
    assert np.nanmax(np.abs(exact.scores)) > 1e-4
    np.testing.assert_allclose(linear.scores, exact.scores, atol=1e-12)
    np.testing.assert_allclose(linear.given, exact.given, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "strand"),
    [("equivariant", "fwd"), ("equivariant", "rev"), ("conjoined", "both"), ("causal", "both"), ("next", "both"),
     ("masked equivariant", "fwd"), ("masked", "both")],
)  # fmt: skip
def test_the_explanation_of_a_reverse_complement_is_mirrored(models, kind, strand):
    explainer = explainer_of(models[kind], strand)
    for function in [explainer.mutagenesis] + [explainer.gradient] * ("masked" not in kind):
        given, turned = function(tokens(TEXT), 2, 10), function(tokens(other(TEXT)), len(TEXT) - 10, len(TEXT) - 2)
        np.testing.assert_allclose(turned.scores[::-1, ::-1], given.scores, atol=1e-9)
        np.testing.assert_allclose(turned.given, given.given, atol=1e-9)


def test_a_motif_that_a_model_looks_for_is_found_and_nothing_else(tmp_path):
    words = KmerConfig(k=6, alphabet=(7, 8, 9, 10), width=1)
    head = HeadConfig(task="sequence", labels=("no", "yes"))
    backbone = BackboneConfig(d_model=4, layers=(), kmer=words)
    config = ModelConfig(vocab_size=16, backbone=backbone, head=head, tokenizer=TOKENIZER)
    model = seqmodels.build(config, seed=0)
    number = sum("ACGT".index(base) * 4 ** (5 - i) for i, base in enumerate("TATAAA"))
    with torch.no_grad():
        model.backbone.embedding.weight.copy_(torch.ones(16, 4))
        model.backbone.kmer.table.weight.zero_()[number] = 1
        model.backbone.kmer.proj.weight.copy_(torch.tensor([[9.0], [0], [0], [0]]))
        model.score.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [5, 0, 0, 0]]))
    explainer = explainer_of(str(seqmodels.save(model, tmp_path)))
    text = "GGCGCCGTGC" + "TATAAA" + "GCGCCGGACCGG"
    for function in (explainer.mutagenesis, explainer.gradient):
        effects = function(tokens(text), classes=[1])
        heights = importance(effects.scores)[:, 0]
        assert [i for i, height in enumerate(heights) if abs(height) > 1e-9] == list(range(10, 16))
        assert heights[10:16].min() > 0
    assert explainer.predicted(tokens(text)) == [1]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture
def genome(tmp_path):
    path, text = tmp_path / "g.fa", "".join(np.random.default_rng(0).choice(list("ACGT"), 60))
    text = text[:20] + "nN" + text[22:30].lower() + text[30:]
    path.write_text(f">chr1 first\n{text}\n>chr2\nNNNNNNN\n>none\n\n>bad\nAC1T\n>long\n{text * 3}\n")
    return path, text.upper()


@pytest.mark.parametrize("kind", ["causal", "both"])
def test_rows_are_the_changes_that_dna_classify_finds_in_the_changed_records(models, genome, tmp_path, kind):
    text = genome[1]
    words = [
        "dna",
        "explain",
        genome[0],
        "--model",
        models[kind],
        "-o",
        tmp_path / "o.tsv",
        "--device",
        "cpu",
        "--strand",
    ]
    words += ["both", "--region", "chr1:15-25", "--region", "long:100-101", "--label", "b", "--label", "a"]
    assert cli.main([*map(str, words), "--context", "5"]) == 0
    rows = rows_of(tmp_path / "o.tsv")
    places = [*((15 - 1 + i, b) for i, b in enumerate(text[14:25]) if b != "N")]
    assert [(row["start"], row["end"], row["ref"], row["alt"]) for row in rows if row["seq"] == "chr1"] == [
        (str(at), str(at + 1), ref, alt) for _ in "ba" for at, ref in places for alt in "ACGT" if alt != ref
    ]
    assert [row["class"] for row in rows] == ["b"] * 27 + ["a"] * 27 + ["b"] * 6 + ["a"] * 6
    changed = [text[9:30]] + [text[9 : int(r["start"])] + r["alt"] + text[int(r["end"]) : 30] for r in rows[:27]]
    (tmp_path / "c.fa").write_text("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(changed)))
    classify([tmp_path / "c.fa"], models[kind], tmp_path / "c.tsv", strand="both", device="cpu")
    table = rows_of(tmp_path / "c.tsv")
    for name, own in (("b", rows[:27]), ("a", rows[27:54])):
        p = np.array([float(row[f"p_{name}"]) for row in table])
        odds = np.log(p / (1 - p))
        np.testing.assert_allclose([float(row["p_ref"]) for row in own], p[0], atol=2e-6)
        np.testing.assert_allclose([float(row["dp"]) for row in own], p[1:] - p[0], atol=3e-6)
        np.testing.assert_allclose([float(row["dlogit"]) for row in own], odds[1:] - odds[0], atol=3e-5)
    manifest = json.loads((tmp_path / "o.tsv.json").read_text())
    assert (manifest["rows"], manifest["settings"]["context"]) == (len(rows), 5)


def test_intervals_of_the_minus_strand_have_the_letters_and_places_of_the_file(models, genome, tmp_path):
    text = genome[1]
    (tmp_path / "x.bed").write_text("chr1\t30\t41\tm\t0\t-\n")
    (tmp_path / "m.fa").write_text(f">m\n{other(text[30:41])}\n")
    options = {"model": models["causal"], "device": "cpu", "label": ["a"], "span": 4}
    assert explain([genome[0]], output=tmp_path / "o.tsv", bed=tmp_path / "x.bed", **options) == 0
    assert explain([tmp_path / "m.fa"], output=tmp_path / "m.tsv", **options) == 0
    found = {(int(r["start"]), r["alt"]): (r["ref"], r["dlogit"], r["strand"]) for r in rows_of(tmp_path / "o.tsv")}
    assert {start for start, _ in found} == {34, 35, 36, 37}
    turned = rows_of(tmp_path / "m.tsv")
    assert len(found) == len(turned) == 12
    for row in turned:
        ref, change, strand = found[40 - int(row["start"]), other(row["alt"])]
        assert (ref, strand) == (other(row["ref"]), "-")
        assert float(change) == pytest.approx(float(row["dlogit"]), abs=1e-5)
        assert text[40 - int(row["start"])] == ref


def test_bases_that_are_not_explained_have_a_row_that_says_why(models, genome, tmp_path, capsys):
    options = {"device": "cpu", "span": 3, "output": tmp_path / "o.tsv"}
    assert explain([genome[0]], models["both"], batch_tokens=100, **options) == 2
    rows = {row["seq"]: row for row in rows_of(tmp_path / "o.tsv")}
    statuses = [rows[name]["status"] for name in ("chr1", "chr2", "none", "bad", "long")]
    assert statuses == ["ok", "only_n", "empty", "invalid", "too_long"]
    assert rows["long"]["ref"] == rows["long"]["dlogit"] == ""
    assert "4 records or intervals have no explanation; chr2 is only_n" in capsys.readouterr().err
    regions = ["chr1:21-22", "chr3:1-5", "chr1:100-105", "chr1:59-62"]
    assert explain([genome[0]], models["both"], region=regions, **options) == 2
    rows = {row["name"]: row for row in rows_of(tmp_path / "o.tsv")}
    assert [row["status"] for row in rows.values()] == ["only_n", "missing", "outside", "ok"]
    assert rows["chr1:59-62"]["note"] == "2 of 4 bases lie beyond the end of chr1 and are read as N"


def test_one_that_is_killed_goes_on_to_the_same_table_and_track(models, genome, tmp_path, monkeypatch):
    options = {"model": models["causal"], "device": "cpu", "span": 6, "region": ["chr1:3-13", "chr1:30-41", "long"]}

    def run(name, **more):
        assert explain([genome[0]], output=tmp_path / f"{name}.tsv", track=tmp_path / name, **options, **more) == 0
        return [(tmp_path / f"{name}{suffix}").read_bytes() for suffix in (".tsv", ".predicted.bedgraph")]

    whole, mutagenesis, calls = run("whole"), Explainer.mutagenesis, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return mutagenesis(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Explainer, "mutagenesis", killed)
        with pytest.raises(KeyboardInterrupt):
            run("part", resume=True)
    assert not (tmp_path / "part.tsv").exists()
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Explainer, "mutagenesis", lambda *arguments: (calls.append(1), mutagenesis(*arguments))[1])
        assert run("part", resume=True) == whole
    assert len(calls) == 2


@pytest.mark.parametrize(("method", "strand"), [("mutagenesis", "fwd"), ("gradient", "both")])
def test_tracks_and_pictures_show_what_the_table_says(models, genome, tmp_path, monkeypatch, method, strand):
    import pyBigWig

    drawn = []
    monkeypatch.setattr(module, "write_picture", lambda path, panels: drawn.extend(panels))
    (tmp_path / "x.bed").write_text("chr1\t15\t26\tp\t0\t+\nchr1\t26\t40\tm\t0\t-\n")
    options = {"bed": tmp_path / "x.bed", "method": method, "strand": strand, "device": "cpu", "label": ["c"]}
    options |= {"track": tmp_path / "t", "track_format": "bigwig", "picture": tmp_path / "p.png"}
    monkeypatch.setattr(module.Manifest, "write", lambda *_: None)
    assert explain([genome[0]], models["equivariant"], tmp_path / "o.tsv", **options) == 0
    rows = rows_of(tmp_path / "o.tsv")
    want = np.full(60, np.nan)
    for at, group in itertools.groupby(rows, lambda row: int(row["start"])):
        own = list(group)
        if method == "gradient":
            want[at] = float(own[0]["importance"])
            assert own[0][f"grad_{own[0]['ref']}"] == own[0]["importance"]
            assert sum(float(own[0][f"grad_{base}"]) for base in "ACGT") == pytest.approx(0, abs=1e-5)
        else:
            want[at] = -sum(float(row["dlogit"]) for row in own) / 4
    with pyBigWig.open(str(tmp_path / "t.c.bw")) as track:
        assert track.chroms()["chr1"] == 60
        np.testing.assert_allclose(track.values("chr1", 0, 60), want, rtol=1e-4, atol=1e-6)
    plus, minus = drawn
    np.testing.assert_allclose(plus.heights, want[15:26], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(minus.heights, want[26:40][::-1], rtol=1e-4, atol=1e-6)
    assert (plus.letters, minus.letters) == (genome[1][15:26], other(genome[1][26:40]))
    assert (plus.positions[0], minus.positions[0], minus.positions[-1]) == (16, 40, 27)
    assert minus.title.startswith("m, minus strand: c (p = ")


def test_a_picture_has_a_letter_as_high_as_its_base_is_important_and_a_square_for_each_exchange(tmp_path):
    rng = np.random.default_rng(0)
    letters = "ACGTN" * 26
    changes = rng.normal(size=(130, 4))
    changes[4::5] = np.nan
    panel = Panel("x $a_^$ 染色体", "chr$1", np.arange(1001, 1131), letters, importance(changes), changes, "log-odds")
    figure = draw([panel, panel._replace(positions=panel.positions[::-1])])
    logos = [axes for axes in figure.axes if axes.get_ylabel() == "importance"]
    maps = [axes for axes in figure.axes if axes.images and axes.get_xlabel()]
    assert [len(axes.patches) for axes in logos] == [80, 24] * 2
    boxes = [patch.get_path().get_extents() for axes in logos[:2] for patch in axes.patches]
    at = np.flatnonzero(~np.isnan(panel.heights))
    np.testing.assert_allclose([box.x0 + 0.46 for box in boxes], at % 100, atol=1e-6)
    heights = panel.heights[at]
    np.testing.assert_allclose([box.y0 for box in boxes], np.minimum(heights, 0), atol=1e-6)
    np.testing.assert_allclose([box.y1 for box in boxes], np.maximum(heights, 0), atol=1e-6)
    np.testing.assert_array_equal(maps[1].images[0].get_array().filled(np.nan), changes[100:].T)
    ticks = {text.get_text(): x for x, text in zip(maps[1].get_xticks(), maps[1].get_xticklabels(), strict=True)}
    assert ticks["1,110"] == 9
    assert maps[2].get_xticklabels()[0].get_text() == "1,130"
    module.write_picture(tmp_path / "p.png", [panel])
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_what_a_picture_has_no_room_for_is_said(models, genome, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(module, "write_picture", lambda path, panels: drawn.extend(panels))
    monkeypatch.setattr(module, "_PICTURED", 3)
    monkeypatch.setattr(module, "PER_ROW", 5)
    options = {"region": ["chr1:1-8", "chr1:30-41", "chr1:50-51"], "method": "gradient", "picture": tmp_path / "p.pdf"}
    assert explain([genome[0]], models["causal"], device="cpu", **options) == 0
    assert [panel.letters for panel in drawn] == [genome[1][:8], genome[1][29:34]]
    assert "p.pdf shows the first 3 of 6 rows; see --span and --region" in capsys.readouterr().err


def test_too_little_memory_is_one_line(models, genome, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Explainer, "gradient", full)
    with pytest.raises(InputError, match="65536 bases at a time do not fit into memory; lower --batch-tokens"):
        explain([genome[0]], models["causal"], tmp_path / "o.tsv", method="gradient", device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["causal", "both", "equivariant", "next"])
def test_explanations_on_a_gpu_are_those_of_a_cpu(models, kind):
    text = tokens("".join(np.random.default_rng(0).choice(list("ACGT"), 300)))
    exact = explainer_of(models[kind], "both")
    found = Explainer(models[kind], "cuda", strand="both")
    for name in ("mutagenesis", "gradient"):
        want = getattr(exact, name)(text, 100, 130).scores
        error = np.abs(getattr(found, name)(text, 100, 130).scores - want).max()
        assert error < 1e-3 * np.abs(want).max() + 2e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": ["z"]}, "has no class 'z'; its classes are a, b, c"),
        ({"model": "next", "label": ["a"]}, "predicts bases and has no classes"),
        ({"model": "masked", "method": "gradient"}, "leave --method out"),
        ({"model": "words", "method": "gradient"}, "counts words"),
        ({"model": "spoken-digits"}, "neither classifies DNA sequences nor predicts bases"),
        ({"span": 0}, "span is 0"),
        ({"context": 5}, "--context is for what lies around a --region"),
        ({"context": -5, "region": ["chr1"]}, "context is -5"),
        ({"picture": "p.jpg"}, "no suffix of a picture; use one of .png, .svg, .pdf"),
        ({"output": "g.fa"}, "is also an input"),
        ({"feature": ["gene"]}, "give --bed too"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_bad_options_get_one_line_and_leave_no_file(models, genome, tmp_path, options, message):
    options = {"model": "causal", "device": "cpu", "output": "o.tsv", **options}
    options["model"] = models.get(options["model"], options["model"])
    options |= {name: tmp_path / options[name] for name in ("output", "picture") if name in options}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        explain([genome[0]], **options)
    assert sorted(tmp_path.iterdir()) == before
