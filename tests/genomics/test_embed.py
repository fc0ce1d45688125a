import functools
import json
import zipfile

import numpy as np
import polars
import pytest
import torch
from Bio.Seq import Seq
from safetensors import safe_open
from safetensors.numpy import load_file

import seqmodels
from seqmodels.config import HeadConfig, StrandsConfig
from seqmodels.errors import InputError
from seqmodels.tasks.genomics import embed as module
from seqmodels.tasks.genomics.embed import Embedder, _Features, embed
from seqmodels.tasks.genomics.tokens import COMPLEMENT_MAP, encode

LENGTHS = (30, 200, 77, 120, 64, 5)


def bases(seed, length):
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), length))


@pytest.fixture
def fasta(tmp_path):
    records = {f"r{i}": bases(i, n) for i, n in enumerate(LENGTHS)}
    path = tmp_path / "x.fa"
    path.write_text("".join(f">{name} text\n{sequence}\n" for name, sequence in records.items()))
    return path, records


@pytest.fixture(scope="module")
def models(make_model):
    import dataclasses

    def equivariant(folder):
        config = seqmodels.load(folder).config
        backbone = dataclasses.replace(config.backbone, strands=StrandsConfig(complement_map=COMPLEMENT_MAP))
        return make_model(backbone=backbone)

    both = make_model(bidirectional=True)
    return {"causal": make_model(head=HeadConfig(task="next_token")), "both": both, "equivariant": equivariant(both)}


def layer_of(folder, sequence, layer, strand, d=16):
    """Features (l, d) of a record by itself, from the layers' own inputs, in float64."""
    model = seqmodels.load(folder, dtype=torch.float64)
    kept = []
    for i, part in enumerate([*model.backbone.layers, model.backbone.norm_f]):
        part.register_forward_pre_hook(
            lambda m, given, i=i: kept.append(given[0] if given[1] is None else sum(given[:2]))
        )
    found = []
    for turned in {"fwd": (False,), "rev": (True,), "both": (False, True)}[strand]:
        kept.clear()
        text = str(Seq(sequence).reverse_complement()) if turned else sequence
        with torch.inference_mode():
            x, _ = model.backbone(torch.from_numpy(encode(text.encode()).astype(np.int64))[None])
        if layer != -1:
            x = kept[layer]
        x = x[0, :, :d] if model.config.backbone.strands is None or layer == -1 else x[0]
        found.append(x.flip(0) if turned else x)
    return (sum(found) / len(found)).numpy()


@pytest.mark.parametrize(("layer", "strand"), [(-1, "rev"), (0, "fwd"), (1, "both")])
@pytest.mark.parametrize("kind", ["causal", "both", "equivariant"])
def test_features_of_any_layer_and_strand_are_those_of_one_pass_however_a_record_is_read(
    models, fasta, tmp_path, kind, layer, strand, one_thread
):
    path, records = fasta
    want = {name: layer_of(models[kind], text, layer, strand) for name, text in records.items()}
    for batch_tokens, chunk in ((10_000, 10_000), (64, 32)):  # whole, and in chunks or two sweeps
        options = {"layer": layer, "strand": strand, "device": "cpu", "batch_tokens": batch_tokens, "chunk": chunk}
        assert embed([path], models[kind], tmp_path / "b.npz", pool="none", **options) == 0
        assert embed([path], models[kind], tmp_path / "m.npz", **options) == 0
        per_base, means = np.load(tmp_path / "b.npz"), np.load(tmp_path / "m.npz")
        assert list(per_base) == list(means["record_id"]) == list(records)
        np.testing.assert_array_equal(means["length"], LENGTHS)
        for i, name in enumerate(records):
            np.testing.assert_allclose(per_base[name], want[name], atol=3e-5)
            np.testing.assert_allclose(means["embedding"][i], want[name].mean(0), atol=3e-5)


def test_every_format_holds_the_same(models, fasta, tmp_path, one_thread):
    path, records = fasta
    for suffix in ("npz", "parquet", "safetensors"):
        assert embed([path], models["causal"], tmp_path / f"m.{suffix}", device="cpu") == 0
    means = np.load(tmp_path / "m.npz")
    table = polars.read_parquet(tmp_path / "m.parquet")
    assert table["record_id"].to_list() == list(records)
    np.testing.assert_array_equal(table.select([f"e{i}" for i in range(16)]).to_numpy(), means["embedding"])
    np.testing.assert_array_equal(load_file(tmp_path / "m.safetensors")["embedding"], means["embedding"])
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["records"])["record_id"] == list(records)
    for suffix in ("npz", "safetensors"):
        assert embed([path], models["causal"], tmp_path / f"b.{suffix}", pool="none", device="cpu") == 0
    tensors = load_file(tmp_path / "b.safetensors")
    for name, array in np.load(tmp_path / "b.npz").items():
        np.testing.assert_array_equal(tensors[name], array)
    assert zipfile.ZipFile(tmp_path / "b.npz").testzip() is None


def test_records_that_cannot_be_read_are_said_and_the_others_are_there(models, tmp_path, capsys, one_thread):
    path = tmp_path / "x.fa"
    path.write_text(">a\nACGTACGT\n>b\nAC1T\n>a\nGGGT\n>empty\n>n\nNNNN\n")
    assert embed([path], models["causal"], tmp_path / "m.npz", device="cpu") == 2
    assert "3 of 5 records have no embedding; the first, b, is invalid" in capsys.readouterr().err
    means = np.load(tmp_path / "m.npz")
    assert list(means["status"]) == ["ok", "invalid", "duplicate", "empty", "only_n"]
    assert np.isnan(means["embedding"]).all(1).tolist() == [False, True, False, True, True]
    assert embed([path], models["causal"], tmp_path / "b.npz", pool="none", device="cpu") == 2
    assert [(name, len(a)) for name, a in np.load(tmp_path / "b.npz").items()] == [("a", 8), ("a#2", 4)]


@pytest.mark.parametrize("name", ["m.npz", "m.parquet", "m.safetensors", "none.npz", "none.safetensors"])
def test_what_is_stopped_anywhere_goes_on_to_the_same_bytes(models, fasta, tmp_path, monkeypatch, name, one_thread):
    fasta[0].write_text(fasta[0].read_text() + ">bad\nAC1T\n>empty\n>r0 again\nACGTA\n")
    options = {"strand": "both", "device": "cpu", "batch_tokens": 10, "chunk": 80}
    options |= {"pool": "none" if "none" in name else "mean"}
    assert embed([fasta[0]], models["causal"], tmp_path / name, **options) == 2
    whole, output = (tmp_path / name).read_bytes(), tmp_path / f"o{name}"
    features, calls = Embedder._features, []

    def stopped(self, after, tokens):
        calls.append(len(tokens))
        if len(calls) == after:
            raise KeyboardInterrupt
        return features(self, tokens)

    for after, rows in ((1, 0), (5, 2), (9, 4)):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Embedder, "_features", functools.partialmethod(stopped, after))
            with pytest.raises(KeyboardInterrupt):
                embed([fasta[0]], models["causal"], output, **options)
            part = output.with_name(f"{output.name}.part")
            assert (part.read_text().count("\n") if part.exists() else 0) == rows
            assert not output.exists()
            calls[:] = [0] * 100
            assert embed([fasta[0]], models["causal"], output, resume=True, **options) == 2
        long = 7 if "none" in name else 5  # records, of which both strands are read alone; the first of them are kept
        assert len(calls) - 100 == 2 * (long - rows)
        assert output.read_bytes() == whole
        output.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["x.fa", name, f"{name}.json", f"o{name}.json"])


def test_other_settings_and_lost_features_are_told(models, fasta, tmp_path, monkeypatch, one_thread):
    options = {"device": "cpu", "batch_tokens": 10, "chunk": 80, "resume": True}
    monkeypatch.setattr(_Features, "_publish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed([fasta[0]], models["causal"], tmp_path / "o.npz", **options)
    monkeypatch.undo()
    with pytest.raises(InputError, match="part was made otherwise: layer was -1 and is 0, strand was fwd and is rev"):
        embed([fasta[0]], models["causal"], tmp_path / "o.npz", layer=0, strand="rev", **options)
    (tmp_path / "o.npz.part.vectors").write_bytes(b"")
    with pytest.raises(InputError, match=r"o.npz.part.vectors lacks what belongs to the rows that are kept"):
        embed([fasta[0]], models["causal"], tmp_path / "o.npz", **options)


def test_what_memory_does_not_hold_is_read_in_windows(models, fasta, tmp_path, monkeypatch, one_thread):
    path, records = fasta
    monkeypatch.setattr(module, "MEMORY", 0.0)
    assert embed([path], models["both"], tmp_path / "b.npz", pool="none", device="cpu", batch_tokens=80) == 0
    for name, array in np.load(tmp_path / "b.npz").items():
        want = layer_of(models["both"], records[name], -1, "fwd")
        assert array.shape == want.shape
        if len(want) <= 80:
            np.testing.assert_allclose(array, want, atol=3e-5)
        else:
            assert np.corrcoef(array.ravel(), want.ravel())[0, 1] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "name a model with --model"),
        ({"output": "x.txt"}, "no suffix of embeddings"),
        ({"output": "x.parquet", "pool": "none"}, "use one of .npz, .safetensors"),
        ({"layer": 3}, "layer is 3; model .* has 2"),
        ({"model": "spoken-digits"}, "is no model of DNA"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_bad_options_get_one_line_and_leave_no_file(models, fasta, tmp_path, options, message):
    given = {"model": models["causal"], "device": "cpu", **options, "output": tmp_path / options.get("output", "o.npz")}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        embed([fasta[0]], **given)
    assert sorted(tmp_path.iterdir()) == before
