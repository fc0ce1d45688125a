import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
from Bio.Seq import Seq

import seqmodels
from seqmodels import cli, presets
from seqmodels.backbone import Backbone
from seqmodels.config import HeadConfig, StrandsConfig
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.genome import read_genome
from seqmodels.tasks.genomics.tokens import COMPLEMENT_MAP, encode
from seqmodels.tasks.genomics.variants import Scorer, variants

HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
CONTEXT = 31


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 300))
    path = tmp_path_factory.mktemp("reference") / "r.fa"
    path.write_text(f">x\n{text}\n")
    return path, text


@pytest.fixture(scope="module")
def models(make_model):
    masked, mamba2 = HeadConfig(task="masked_token"), presets.mamba2(16, 2, d_state=8, head_dim=16, bidirectional=True)
    equivariant = dataclasses.replace(mamba2, strands=StrandsConfig(complement_map=COMPLEMENT_MAP))
    return {
        "next_token": make_model(head=HeadConfig(task="next_token")),
        "masked_token": make_model(head=masked, bidirectional=True),
        "both strands": make_model(head=masked, backbone=equivariant),
        "sequence": make_model(),
    }


def write_vcf(path, text, changes):
    """Lines at positions (from 0) with the reference's own REF."""
    rows = [f"x\t{start + 1}\t.\t{text[start : start + size]}\t{alt}\t.\t.\tAF=0.{i}" for i, (start, size, alt) in
            enumerate(changes)]  # fmt: skip
    path.write_text(HEADER + "\n".join(rows) + "\n")
    return path


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file, delimiter="\t"))


def windows(text, start, size, alt):
    """Both windows of a change that is as short as can be, by hand: N where the record ends, and the longer allele."""
    longer = max(size, len(alt))
    before = (CONTEXT - longer) // 2
    wide = "N" * 100 + text + "N" * 100
    first, after = 100 + start - before, 100 + start + size
    ref, new = wide[first:], wide[first : 100 + start] + alt + wide[after:]
    return ref[:CONTEXT], new[:CONTEXT], (before, before + longer)


def log_p(model, task, window, place):
    """log p of a window by the definition, in float64."""
    ids = torch.from_numpy(encode(window.encode()).astype(np.int64))[None]
    if task == "next_token":
        given, wanted, at = ids[:, :-1], ids[0, 1:], slice(None)
    else:
        given = ids.clone()
        given[:, place[0] : place[1]] = 3
        wanted, at = ids[0, place[0] : place[1]], slice(*place)
    with torch.inference_mode():
        chances = model(given)[0][0, at, 7:11].softmax(-1)
    return sum(math.log(row[i - 7]) for row, i in zip(chances, wanted.tolist(), strict=True) if i <= 10)


def other(text):
    return str(Seq(text).reverse_complement())


def find_substitution(text, start):
    return "ACGT"[("ACGT".index(text[start]) + 1) % 4]


@pytest.mark.parametrize("task", ["next_token", "masked_token", "both strands"])
def test_the_ratio_of_each_strand_is_what_its_definition_gives_in_float64(
    reference, models, task, tmp_path, one_thread
):
    path, text = reference
    genome = read_genome([path])
    model = seqmodels.load(models[task], dtype=torch.float64)
    scorer = Scorer(models[task], "cpu")
    scorer.model = model
    from seqmodels.tasks.genomics.variants import windows_of
    from seqmodels.tasks.genomics.vcf import Change, normalised

    insertion, deletion = (normalised(genome, Change(0, 120, *c)) for c in (("", "GATTC"), (text[120:124], "")))
    changes = [(s, 1, find_substitution(text, s)) for s in (100, 3, 299)]
    changes += [(c.start, len(c.ref), c.alt) for c in (insertion, deletion)]
    changes += [(150, 2, "".join(find_substitution(text, s) for s in (150, 151)))]
    for start, size, alt in changes:
        ref, new, place = windows(text, start, size, alt)
        pair, found_place, padded = windows_of(genome, Change(0, start, text[start : start + size], alt), CONTEXT)
        np.testing.assert_array_equal(pair, [encode(w.encode()) for w in (ref, new)])
        assert (found_place, padded) == (place, ref.count("N"))
        (got,) = scorer.score(pair[None], np.array([place]))
        turned = (CONTEXT - place[1], CONTEXT - place[0])
        fwd = log_p(model, task, new, place) - log_p(model, task, ref, place)
        rev = log_p(model, task, other(new), turned) - log_p(model, task, other(ref), turned)
        assert got["llr_fwd"] == pytest.approx(fwd, abs=1e-9)
        assert got["llr_rev"] == pytest.approx(rev, abs=1e-9)
        assert got["llr"] == pytest.approx((fwd + rev) / 2, abs=1e-9)


def test_distances_and_changes_of_probabilities_are_those_of_the_windows_read_alone(
    reference, models, tmp_path, one_thread
):
    path, text = reference
    changes = [(100, 1, find_substitution(text, 100)), (5, 1, find_substitution(text, 5))]
    vcf = write_vcf(tmp_path / "v.vcf", text, changes)
    options = {"context": CONTEXT, "device": "cpu"}
    assert variants(vcf, path, models["sequence"], tmp_path / "o.tsv", **options) == 0
    model = seqmodels.load(models["sequence"], dtype=torch.float64)
    for row, change in zip(read(tmp_path / "o.tsv"), changes, strict=True):
        chances, means = [], []
        for window in windows(text, *change)[:2]:
            ids = torch.from_numpy(np.stack([encode(w.encode()) for w in (window, other(window))]).astype(np.int64))
            with torch.inference_mode():
                chances.append(model(ids).mean(0).softmax(-1))
                means.append(model.backbone(ids)[0].mean((0, 1)))
        for i, name in enumerate(("left", "right")):
            assert float(row[f"p_ref_{name}"]) == pytest.approx(float(chances[0][i]), abs=2e-6)
            assert float(row[f"dp_{name}"]) == pytest.approx(float(chances[1][i] - chances[0][i]), abs=2e-6)
        assert float(row["distance"]) == pytest.approx(float((means[1] - means[0]).norm()), rel=1e-3)
        cosine = 1 - torch.nn.functional.cosine_similarity(means[0], means[1], dim=0)
        assert float(row["cosine_distance"]) == pytest.approx(float(cosine), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "distance", "read"),
    [
        ("next_token", True, 6),  # the reference and two alleles, on each strand
        ("masked_token", True, 8),  # and with the base hidden
        ("masked_token", False, 2),
        ("both strands", True, 4),
        ("both strands", False, 1),
        ("sequence", False, 6),
    ],
)
def test_no_window_is_read_twice(reference, models, name, distance, read, tmp_path, monkeypatch, one_thread):
    path, text = reference
    vcf = write_vcf(tmp_path / "v.vcf", text, [(100, 1, ",".join(c for c in "ACGT" if c != text[100])[:3])])
    forward, windows = Backbone.forward, []
    monkeypatch.setattr(Backbone, "forward", lambda self, ids: (windows.extend(ids.tolist()), forward(self, ids))[1])
    assert variants(vcf, path, models[name], tmp_path / "o.tsv", context=CONTEXT, device="cpu", distance=distance) == 0
    assert len(windows) == len(set(map(tuple, windows))) == read


@pytest.fixture
def many(reference, tmp_path):
    """Forty variants: of several alleles, said in several ways, at the ends, wrong ones."""
    text = reference[1]
    rng = np.random.default_rng(1)
    changes = [(int(s), 1, find_substitution(text, int(s))) for s in rng.integers(0, 300, 30)]
    changes += [(10, 2, f"{text[10]},{text[10:12]}GG,<DEL>"), (298, 2, text[298]), (20, 40, text[20])]
    vcf = write_vcf(tmp_path / "many.vcf", text, changes)
    with open(vcf, "a") as file:
        file.write("chrx\t1\t.\tN\tC\t.\t.\t.\nz\t1\t.\tA\tC\t.\t.\t.\nx\tone\t.\tA\tC\t.\t.\t.\n")
    return vcf


@pytest.mark.parametrize("task", ["next_token", "masked_token"])
def test_rows_are_the_same_however_many_are_read_together_and_after_a_kill(
    reference, models, many, task, tmp_path, monkeypatch, one_thread, capsys
):
    options = {"context": CONTEXT, "device": "cpu", "info": "AF"}
    path = reference[0]
    assert variants(many, path, models[task], tmp_path / "one.tsv", batch_tokens=4 * CONTEXT, **options) == 2
    what = "5 of 38 alleles have no score (1 invalid, 1 mismatch, 1 no_record, 1 symbolic, 1 too_long)"
    assert what in capsys.readouterr().err
    assert variants(many, path, models[task], tmp_path / "all.tsv", batch_tokens=30 * CONTEXT, **options) == 2
    one, together = read(tmp_path / "one.tsv"), read(tmp_path / "all.tsv")
    assert [row["status"] for row in one[-4:]] == ["too_long", "mismatch", "no_record", "invalid"]
    assert [row["AF"] for row in one[:3]] == ["0.0", "0.1", "0.2"]
    for a, b in zip(one, together, strict=True):
        for name, value in a.items():
            if name.startswith(("llr", "distance")) and value:
                assert float(value) == pytest.approx(float(b[name]), abs=2e-5)
            elif name != "cosine_distance":
                assert value == b[name]
    score, calls = Scorer.score, []

    def killed(self, pairs, places):
        calls.append(len(pairs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, pairs, places)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", killed)
        with pytest.raises(KeyboardInterrupt):
            variants(many, path, models[task], tmp_path / "k.tsv", batch_tokens=30 * CONTEXT, resume=True, **options)
    assert not (tmp_path / "k.tsv").exists()
    variants(many, path, models[task], tmp_path / "k.tsv", batch_tokens=30 * CONTEXT, resume=True, **options)
    assert (tmp_path / "k.tsv").read_bytes() == (tmp_path / "all.tsv").read_bytes()


def test_a_change_has_the_same_score_however_it_is_written(reference, models, tmp_path, one_thread):
    path, text = reference
    repeat = next(i for i in range(50, 250) if text[i] == text[i + 1])
    written = [(repeat - 1, 2, text[repeat - 1]), (repeat, 2, text[repeat]), (repeat - 3, 8, None)]
    changes = [(s, n, alt or text[s : s + 3] + text[s + 4 : s + n]) for s, n, alt in written]
    vcf = write_vcf(tmp_path / "v.vcf", text, changes)
    variants(vcf, path, models["next_token"], tmp_path / "o.tsv", context=CONTEXT, device="cpu")
    rows = read(tmp_path / "o.tsv")
    for name in ("llr", "norm_pos", "norm_ref", "norm_alt", "distance"):
        assert len({row[name] for row in rows}) == 1


def test_a_vcf_comes_out_with_each_alleles_scores_in_its_info(reference, models, many, tmp_path, one_thread):
    path = reference[0]
    options = {"context": CONTEXT, "device": "cpu"}
    variants(many, path, models["next_token"], tmp_path / "o.vcf", **options)
    variants(many, path, models["next_token"], tmp_path / "o.tsv", **options)
    rows = iter(read(tmp_path / "o.tsv"))
    given = [line for line in many.read_text().splitlines() if not line.startswith("#")]
    found = [line for line in (tmp_path / "o.vcf").read_text().splitlines() if not line.startswith("#")]
    for before, after in zip(given, found, strict=True):
        assert after.split("\t")[:7] == before.split("\t")[:7]
        values = dict(item.partition("=")[::2] for item in after.split("\t")[7].split(";"))
        own = [next(rows) for _ in before.split("\t")[4].split(",")]
        if "LS_STATUS" not in values:  # a line that cannot be read stays as it is
            assert (after, own[0]["status"]) == (before, "invalid")
            continue
        assert values["LS_STATUS"].split(",") == [row["status"] for row in own]
        llr = [row["llr"] or "." for row in own]
        assert values.get("LS_LLR", ",".join("." for _ in own)).split(",") == llr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": None}, "name the FASTA file"),
        ({"model": "spoken-digits"}, "neither predicts bases nor classifies"),
        ({"context": 2}, "context is 2"),
        ({"batch_tokens": 10}, "batch_tokens is 10, less than the 4 windows of 31 bases"),
        ({"output": "o.vcf", "resume": True}, "leave out --resume"),
        ({"output": "o.vcf/o.tsv"}, "cannot write"),
    ],
)
def test_bad_options_get_one_line(reference, models, many, tmp_path, options, message):
    given = {"reference": reference[0], "model": models["next_token"], "context": CONTEXT, "device": "cpu", **options}
    if "output" in given:
        (tmp_path / "o.vcf").write_text("") if "/" in given["output"] else None
        given["output"] = tmp_path / given["output"]
    with pytest.raises(InputError, match=message):
        variants(many, **given)


def test_the_command_line_says_what_is_missing(capsys):
    assert cli.main(["dna", "variants", "x.vcf"]) == 2
    assert "--reference" in capsys.readouterr().err
