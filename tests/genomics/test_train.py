import csv
import dataclasses
import os

import numpy as np
import pytest
import torch

import seqmodels
from seqmodels import presets
from seqmodels.caduceus import save_caduceus
from seqmodels.config import (
    BidirectionalConfig,
    ConvConfig,
    HeadConfig,
    Mamba2Config,
    MambaConfig,
    ModelConfig,
    StrandsConfig,
)
from seqmodels.errors import InputError
from seqmodels.tasks.genomics import datasets
from seqmodels.tasks.genomics.backbones import choose_backbone
from seqmodels.tasks.genomics.classify import classify
from seqmodels.tasks.genomics.datasets import RecordData
from seqmodels.tasks.genomics.evaluate import evaluate
from seqmodels.tasks.genomics.tokens import COMPLEMENT_MAP, TOKENIZER
from seqmodels.tasks.genomics.train import train
from seqmodels.training import TrainingConfig

TINY = {"d_model": 32, "n_layer": 1, "d_state": 8}


def biased(rng, favourite, length):
    """Bases of which one half is the class's favourite pair: composition tells the classes apart."""
    p = [0.1] * 4
    for base in favourite:
        p["ACGT".index(base)] = 0.4
    return "".join(rng.choice(list("ACGT"), length, p=p))


def training(**changes):
    return TrainingConfig(**{"max_steps": 30, "validate_every": 15, "learning_rate": 1e-2, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "train.csv"
    rows = [f"{biased(rng, pair, int(rng.integers(40, 80)))},{pair}-rich" for pair in ["AT", "GC"] * 50]
    path.write_text("sequence,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, table):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "run"
    code = train(table, folder, batch_tokens=1600, **TINY, training=training())
    assert code == 0
    return folder


def test_a_trained_model_tells_the_classes_apart(run, tmp_path):
    rng = np.random.default_rng(1)
    pairs = ["AT", "GC"] * 10
    (tmp_path / "x.fa").write_text("".join(f">r{i}\n{biased(rng, p, 200)}\n" for i, p in enumerate(pairs)))
    assert classify([tmp_path / "x.fa"], model=str(run / "model"), output=tmp_path / "o.tsv", device="cpu") == 0
    with open(tmp_path / "o.tsv") as file:
        labels = [row["label"] for row in csv.DictReader(file, delimiter="\t")]
    assert np.mean([label == f"{pair}-rich" for label, pair in zip(labels, pairs, strict=True)]) > 0.9


def test_the_checkpoint_says_what_it_needs(run):
    config = seqmodels.load(run / "model").config
    assert config.head.labels == ("AT-rich", "GC-rich")
    assert config.tokenizer["type"] == "dna"
    card = (run / "model" / "README.md").read_text()
    assert "AT-rich" in card
    assert str(run) not in card


def test_the_same_seed_trains_the_same_weights_and_another_one_does_not(run, table, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        train(table, tmp_path / name, batch_tokens=1600, **TINY, training=training(seed=seed))
    weights = [
        (folder / "model" / "model.safetensors").read_bytes() for folder in (run, tmp_path / "same", tmp_path / "other")
    ]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_packed_records_steps_by_bases_and_a_kill_go_together(table, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    options = {"batch_tokens": 320, "batching": "packed", **TINY}
    steps = training(max_steps=8, validate_every=4, step_tokens=1000)
    train(table, tmp_path / "whole", **options, training=steps)
    with monkeypatch.context() as patch:
        read = RecordData.train_batch

        def broken(self, step):
            if step >= 3 * 6:
                raise ConnectionError
            return read(self, step)

        patch.setattr(RecordData, "train_batch", broken)
        with pytest.raises(ConnectionError):
            train(table, tmp_path / "run", **options, training=steps)
    train(table, tmp_path / "run", **options, training=dataclasses.replace(steps, resume=True))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_windows_grow_over_as_many_steps_when_steps_go_by_bases(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    for pair in ("AT", "GC"):
        (tmp_path / f"{pair}.fa").write_text(f">{pair}\n{biased(rng, pair, 3000)}\n")
    (tmp_path / "metadata.csv").write_text("file,record,label\nAT.fa,AT,AT\nGC.fa,GC,GC\n")
    monkeypatch.setattr(datasets, "SHORTEST", 16)
    lengths = []
    monkeypatch.setattr(
        "seqmodels.training._Task._gradients",
        lambda self, numbers, batches: (
            lengths.append([batch["ids"].shape[1] for batch in batches]) or {"loss": torch.zeros(())}
        ),
    )
    train(
        tmp_path, tmp_path / "run", window="128", batch_tokens=256, length_warmup=6, **TINY,
        training=training(max_steps=8, step_tokens=1024),
    )  # fmt: skip
    assert lengths == [[16] * 4] * 2 + [[32] * 4] * 2 + [[64] * 4] * 2 + [[128] * 4] * 2


@pytest.mark.parametrize("mixer", ["mamba", "attention", "lstm", "cnn,mamba2"])
def test_every_mixer_trains_on_windows_of_long_records(tmp_path, mixer):
    torch.set_num_threads(1)
    rng = np.random.default_rng(2)
    lines = ["file,record,species"]
    for pair in ("AT", "GC"):
        (tmp_path / f"{pair}.fa").write_text(f">{pair}\n{biased(rng, pair, 3000)}\n")
        lines.append(f"{pair}.fa,{pair},{pair} species")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    options = {k: v for k, v in TINY.items() if k != "d_state"}
    bidirectional = mixer in ("lstm", "cnn,mamba2")
    train(
        tmp_path, tmp_path / "run", window="40,100", batch_tokens=400, mixer=mixer, bidirectional=bidirectional,
        **options, training=training(max_steps=4, validate_every=2),
    )  # fmt: skip
    assert evaluate(str(tmp_path / "run" / "model"), tmp_path, window="100", resamples=5, device="cpu") == 0
    assert seqmodels.load(tmp_path / "run" / "model").causal is not bidirectional


def test_layers_of_several_kinds_take_turns_and_convolutions_reach_further_one_after_the_other():
    options = {"kmer": None, "strands": None, "bidirectional": True, "tie_projections": False}
    backbone = choose_backbone(None, "cnn,cnn,mamba2", 64, 7, 4, **options)
    both = BidirectionalConfig(mixer=Mamba2Config(d_state=4))
    conv = [ConvConfig(dilation=2 ** (i // 2)) for i in range(5)]
    assert backbone.layers == (conv[0], conv[1], both, conv[2], conv[3], both, conv[4])
    seqmodels.build(ModelConfig(vocab_size=16, backbone=backbone, head=HeadConfig(task="masked_token")))


@pytest.mark.parametrize("strands", ["conjoined", "equivariant"])
def test_a_caduceus_is_fine_tuned_from_its_folder_and_then_says_the_same_of_both_strands(
    table, tmp_path, strands, one_thread
):
    equivariant = strands == "equivariant"
    backbone = presets.caduceus(16, 2, complement_map=COMPLEMENT_MAP if equivariant else None)
    config = ModelConfig(vocab_size=16, backbone=backbone, head=HeadConfig(task="masked_token"), tokenizer=TOKENIZER)
    pretrained = save_caduceus(seqmodels.build(config, seed=3), tmp_path / "pretrained")
    options = {} if equivariant else {"strands": strands}  # which a Caduceus-PS says itself
    steps = training(max_steps=1, learning_rate=0.0)
    train(table, tmp_path / "run", batch_tokens=1600, start_from=str(pretrained), **options, training=steps)
    model = seqmodels.load(tmp_path / "run" / "model")
    assert model.config.backbone.strands == StrandsConfig(complement_map=COMPLEMENT_MAP, training=equivariant)
    for name, tensor in seqmodels.load(pretrained).backbone.state_dict().items():
        torch.testing.assert_close(model.backbone.state_dict()[name], tensor, rtol=0, atol=0)
    fasta = tmp_path / "both.fa"
    given = biased(np.random.default_rng(5), "AT", 90)
    other = given[::-1].translate(str.maketrans("ACGT", "TGCA"))
    fasta.write_text(f">given\n{given}\n>other\n{other}\n")
    for batch in (1000, 40):  # whole, and in sweeps
        out = tmp_path / f"{batch}.csv"
        assert classify([fasta], str(tmp_path / "run" / "model"), out, device="cpu", batch_tokens=batch, chunk=32) == 0
        rows = list(csv.DictReader(out.read_text().splitlines()))
        assert {row["reading"] for row in rows} == {"whole" if batch == 1000 else "two-sweeps"}
        for name in ("logit_AT-rich", "logit_GC-rich"):
            assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), abs=1e-5)
    assert "get the same answer" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_layers_are_taken_from_the_start_unless_described(table, tmp_path, run, one_thread):
    steps = training(max_steps=1)
    train(table, tmp_path / "same", batch_tokens=1600, start_from=str(run / "model"), training=steps)
    same = seqmodels.load(tmp_path / "same" / "model").config
    assert same.backbone == seqmodels.load(run / "model").config.backbone
    options = {"start_from": str(run / "model"), "mixer": "mamba", "n_layer": 1, "d_model": 16, "d_state": 4}
    options |= {"bidirectional": True, "tie_projections": True, "strands": "equivariant"}
    train(table, tmp_path / "other", batch_tokens=1600, **options, training=steps)
    other = seqmodels.load(tmp_path / "other" / "model").config.backbone
    assert other.layers == (BidirectionalConfig(mixer=MambaConfig(d_state=4), tie_projections=True),)
    assert other.strands == StrandsConfig(complement_map=COMPLEMENT_MAP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie_projections": True}, "tie_projections is for mamba and mamba2 with --bidirectional"),
        ({"start_from": "spoken-digits"}, "spoken-digits is not a model of the tokens of DNA"),
        ({"window": "1000", "batch_tokens": 100}, "batch_tokens is 100, less than one window of 1000"),
        ({"window": "ten"}, "window is 'ten'"),
        ({"mixer": "cnn,mamba3"}, "mixer is 'cnn,mamba3'; expected one of mamba, mamba2, attention"),
        ({"mixer": "lstm", "d_state": 4}, "lstm has no such size"),
        ({"mixer": "attention", "bidirectional": True}, "attention has no option bidirectional"),
        ({"mixer": "cnn", "bidirectional": True}, "a CNN reads both directions as it is; leave --bidirectional out"),
        ({"baseline": "cnn", "bidirectional": True}, "a CNN reads both directions as it is"),
        ({"validation_fraction": 2.0}, "validation_fraction is 2.0"),
        ({"labels": "missing.tsv"}, "missing.tsv does not exist"),
        ({"batching": "packed", "supervise_every": 8}, "supervise_every needs a row for each record"),
        ({"training": training(step_tokens=1000)}, "step_tokens is 1000, less than the 65536 bases that are read at"),
        ({"training": training(step_tokens=1 << 17, accumulate=2)}, "only one of them can say"),
    ],
)
def test_bad_options_are_told_before_a_run_is_begun(table, tmp_path, options, message):
    if "labels" in options:
        options = {**options, "labels": tmp_path / options["labels"]}
    with pytest.raises(InputError, match=message):
        train(table, tmp_path / "run", **{"training": training(), **options})
    assert os.listdir(tmp_path) == []
