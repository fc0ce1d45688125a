import dataclasses
import gzip
import itertools
import json
import math
import os
from collections import Counter

import numpy as np
import pytest
import torch
from Bio import SeqIO
from Bio.Seq import Seq

import seqmodels
from seqmodels.config import BidirectionalConfig, StrandsConfig
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.genome import read_genome
from seqmodels.tasks.genomics.markov import reference_bits
from seqmodels.tasks.genomics.pretrain import GenomeData, divide, masked, pretrain
from seqmodels.tasks.genomics.tokens import COMPLEMENT_MAP, decode, encode
from seqmodels.training import TrainingConfig

TINY = {"d_model": 32, "n_layer": 1, "d_state": 8, "window": 64, "batch_tokens": 512, "validation": "0.2"}


def random_bases(seed, length, letters="ACGT"):
    return "".join(np.random.default_rng(seed).choice(list(letters), length))


def steps(**changes):
    return TrainingConfig(**{"max_steps": 6, "validate_every": 3, "device": "cpu", **changes})


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "genome.fa.gz"
    records = {"one": random_bases(0, 3000, "ACGTacgtN"), "two": random_bases(1, 2000), "three": random_bases(2, 900)}
    with gzip.open(path, "wt") as file:
        for name, sequence in records.items():
            file.write(f">{name} a record\n{sequence[:500]}\n{sequence[500:]}\n")
    return path, records


def test_any_stretch_of_a_genome_is_what_the_file_says_and_n_lies_outside(fasta, tmp_path):
    path, records = fasta
    for folder in (None, tmp_path / "run", tmp_path / "run"):  # the last time from what lies there
        genome = read_genome([path], folder)
        assert genome.names == ("one", "two", "three")
        for record, sequence in enumerate(records.values()):
            assert genome.length(record) == len(sequence)
            for start, end in ((0, 10), (490, 510), (-5, 3), (len(sequence) - 3, len(sequence) + 4), (-9, -2)):
                want = "".join(sequence[i].upper() if 0 <= i < len(sequence) else "N" for i in range(start, end))
                assert decode(genome.bases(record, start, end)) == want


def test_tokens_on_disk_are_made_anew_when_the_file_has_changed(fasta, tmp_path):
    path, _ = fasta
    read_genome([path], tmp_path)
    path.write_text(">other\nACGT\n")
    assert read_genome([path], tmp_path).names == ("other",)


@pytest.mark.data
def test_real_genomes_are_read_as_biopython_reads_them(tmp_path):
    path = os.path.join(os.environ["LONGSEQ_DATA"], "genomes/blochmannia/blochmannia.fa.gz")
    genome = read_genome([path])
    with gzip.open(path, "rt") as file:
        for i, record in enumerate(SeqIO.parse(file, "fasta")):
            assert genome.names[i] == record.id
            assert decode(genome.bases(i, 0, genome.length(i))) == str(record.seq)


def test_15_percent_of_the_bases_are_targets_and_of_these_80_are_hidden_10_replaced_and_10_shown():
    rng = np.random.default_rng(0)
    ids = rng.choice([4, 7, 8, 9, 10, 11], size=(40, 5000)).astype(np.int64)
    bases = (ids >= 7) & (ids <= 10)
    shown, targets = masked(ids, bases, 0.15, rng)
    chosen = targets != -100
    assert not (chosen & ~bases).any()
    np.testing.assert_array_equal(targets[chosen], ids[chosen])
    np.testing.assert_array_equal(shown[~chosen], ids[~chosen])
    n = chosen.sum()
    assert n / bases.sum() == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / bases.sum()))
    hidden, same = shown[chosen] == 3, shown[chosen] == ids[chosen]
    for share, want in ((hidden.mean(), 0.8), (same.mean(), 0.1 + 0.1 / 4), ((~hidden & ~same).mean(), 0.075)):
        assert share == pytest.approx(want, abs=4 * math.sqrt(want * (1 - want) / n))
    replaced = Counter(shown[chosen][~hidden & ~same].tolist())
    assert replaced.keys() == {7, 8, 9, 10}
    assert max(replaced.values()) < 1.4 * min(replaced.values())


@pytest.mark.parametrize("mask_fraction", [None, 0.15])
def test_windows_are_of_either_strand_and_weights_follow_the_case_of_what_is_predicted(fasta, mask_fraction):
    path, records = fasta
    genome = read_genome([path])
    train, held = divide(genome, None, "two", "three", 50, seed=0)
    data = GenomeData(genome, train, held, 50, batch_tokens=1000, mask_fraction=mask_fraction, soft_mask_weight=0.25)
    given = records["one"]
    other = str(Seq(given).reverse_complement())
    strands = set()
    for number in range(3):
        batch = data.train_batch(number)
        again = data.train_batch(number)
        assert all(torch.equal(batch[name], again[name]) for name in ("ids", "targets", "weights"))
        for ids, targets, weights in zip(*(batch[name].numpy() for name in ("ids", "targets", "weights")), strict=True):
            truth = np.where(targets == -100, ids, targets) if mask_fraction else ids
            window = decode(truth.astype(np.uint8))
            strand = next(s for s in (given, other) if window in s.upper())
            strands.add(strand)
            place = strand.upper().index(window)
            written = strand[place : place + 50]
            for i, target in enumerate(targets):
                predicted = i if mask_fraction else i + 1
                if target != -100:
                    assert decode(np.array([target], dtype=np.uint8)) == written[predicted].upper() != "N"
                    assert weights[i] == (0.25 if written[predicted].islower() else 1)
                elif not mask_fraction:
                    assert predicted == 50 or written[predicted] in "Nn"
    assert len(strands) == 2


def test_what_is_held_out_or_left_out_is_never_trained_on(fasta):
    path, records = fasta
    genome = read_genome([path])
    train, held = divide(genome, None, "0.2", "two", 64, seed=1)
    assert {s.record for s in train} == {s.record for s in held} == {0, 2}
    for record in (0, 2):
        taken = [set(range(s.start, s.end)) for s in (*train, *held) if s.record == record]
        assert sum(map(len, taken)) == len(set().union(*taken)) == genome.length(record)
    train, held = divide(genome, None, "two", "", 64, seed=1)
    assert ({s.record for s in train}, {s.record for s in held}) == ({0, 2}, {1})
    data = GenomeData(genome, train, held, 64, batch_tokens=6400, augment=False)
    for ids in data.train_batch(0)["ids"].numpy():
        assert decode(ids.astype(np.uint8)) not in records["two"]
    (windows,) = data.validation_batches()
    assert decode(windows["ids"][0].numpy().astype(np.uint8)) == records["two"][:64]


def test_intervals_of_a_bed_file_are_read_and_short_ones_widened(fasta, tmp_path):
    path, _ = fasta
    genome = read_genome([path])
    bed = tmp_path / "x.bed"
    bed.write_text("track name=x\none\t100\t300\ttrain\none\t5\t10\ttrain\ntwo\t0\t200\tvalid\nthree\t0\t9\ttest\n")
    train, held = divide(genome, bed, "0.1", "", 64, seed=0)
    assert [(s.record, s.start, s.end) for s in train] == [(0, 100, 300), (0, 0, 64)]
    assert [(s.record, s.start, s.end) for s in held] == [(1, 0, 200)]
    bed.write_text("one\t100\t300\tgene1\none\t2998\t3000\tgene2\ntwo\t0\t200\tgene3\n")
    train, held = divide(genome, bed, "two", "", 64, seed=0)
    assert [(s.record, s.start, s.end) for s in train] == [(0, 100, 300), (0, 2936, 3000)]
    assert [(s.record, s.start, s.end) for s in held] == [(1, 0, 200)]


@pytest.mark.parametrize("kind", ["next", "masked"])
def test_the_reference_is_the_best_table_of_counts(kind):
    rng = np.random.default_rng(3)
    text, state = "", 0
    for _ in range(4000):  # each base depends on the one before, and on the one before that
        state = (state * 4 + int(rng.choice(4, p=np.roll([0.7, 0.1, 0.1, 0.1], state % 4 + state // 4 % 4)))) % 16
        text += "ACGT"[state % 4]
    windows = [text[3000:3500], text[3500:]]
    training = [text[:1500] + "N" + text[1500:3000]]
    found = reference_bits([encode(t.encode()) for t in training], np.stack([encode(w.encode()) for w in windows]),
                           masked=kind == "masked")  # fmt: skip
    strands = [s for t in training for s in (t, str(Seq(t).reverse_complement()))]
    longest, best = {"next": 5, "masked": 5}[kind], []
    for k in range(longest // 2 + 1 if kind == "masked" else longest):
        size, place = (2 * k + 1, k) if kind == "masked" else (k + 1, k)
        whole = [s[i : i + longest] for s in strands for i in range(len(s) - longest + 1)]
        part = slice(longest // 2 - k, longest // 2 + k + 1) if kind == "masked" else slice(longest - size, longest)
        count = Counter(w[part] for w in whole if "N" not in w)
        bits = []
        for word in (w[i : i + longest][part] for w in windows for i in range(len(w) - longest + 1)):
            others = [count[word[:place] + b + word[place + 1 :]] + 1 for b in "ACGT"]
            bits.append(-math.log2((count[word] + 1) / sum(others)))
        best.append(np.mean(bits))
    assert found[0] == int(np.argmin(best))
    assert found[1] == pytest.approx(min(best), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "layers", "strands"),
    [
        ({}, "one way", None),
        ({"objective": "masked-token"}, "both", None),
        ({"objective": "masked-token", "mixer": "mamba2", "tie_projections": True, "strands": "equivariant"}, "both",
         StrandsConfig(complement_map=COMPLEMENT_MAP)),
    ],
)  # fmt: skip
def test_a_pretrained_model_says_what_it_is_and_resumes_exactly(
    fasta, tmp_path, options, layers, strands, one_thread, monkeypatch, capsys
):
    path, _ = fasta
    options = {**TINY, **options, "soft_mask_weight": 0.5, "length_warmup": 2}
    assert pretrain([path], tmp_path / "whole", **options, training=steps()) == 0
    said = capsys.readouterr().err
    model = seqmodels.load(tmp_path / "whole" / "model")
    assert model.config.head.task == ("next_token" if layers == "one way" else "masked_token")
    assert isinstance(model.config.backbone.layers[0], BidirectionalConfig) == (layers == "both")
    assert model.config.backbone.strands == strands
    card = (tmp_path / "whole" / "model" / "README.md").read_text()
    bits = said.split("the model: ")[1].split()[0]
    assert f"{bits} bits per base. For comparison" in card
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert f"{results['bits_per_base']:.4f}" == bits
    assert f"{results['counting_bits_per_base']:.4f} bits per base by counting" in said
    assert str(tmp_path) not in card
    with monkeypatch.context() as patch:
        read = GenomeData.train_batch

        def broken(self, step):
            if step >= 4:
                raise ConnectionError
            return read(self, step)

        patch.setattr(GenomeData, "train_batch", broken)
        with pytest.raises(ConnectionError):
            pretrain([path], tmp_path / "run", **options, training=steps())
    pretrain([path], tmp_path / "run", **options, training=dataclasses.replace(steps(), resume=True))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]


def test_a_model_learns_what_lies_further_back_than_any_table_reaches(tmp_path, one_thread):
    period = random_bases(5, 40)  # known after a few bases; noise makes long words useless
    rng = np.random.default_rng(6)
    text = "".join(random_bases(i, 1) if rng.random() < 0.1 else base
                   for i, base in zip(range(6000), itertools.cycle(period), strict=False))  # fmt: skip
    path = tmp_path / "x.fa"
    path.write_text(f">x\n{text}\n")
    options = {**TINY, "window": 128, "batch_tokens": 1024, "d_model": 32, "reverse_complement": False}
    training = steps(max_steps=60, validate_every=60, learning_rate=2e-2)
    pretrain([path], tmp_path / "run", **options, training=training)
    with open(tmp_path / "run" / "logs" / "version_0" / "metrics.csv") as file:
        header, *lines = (line.strip().split(",") for line in file)
    values = [float(row[header.index("val_bits")]) for row in lines if row[header.index("val_bits")]]
    assert values[-1] < 1.2  # entropy of the noise: 0.64


def test_the_layers_of_a_pretrained_model_go_on_with_the_same_objective_only(fasta, tmp_path, one_thread):
    path, _ = fasta
    pretrain([path], tmp_path / "first", **TINY, training=steps(max_steps=1))
    first = str(tmp_path / "first" / "model")
    sizes = {k: v for k, v in TINY.items() if k not in ("d_model", "n_layer", "d_state")}
    still = steps(max_steps=1, learning_rate=0.0)
    pretrain([path], tmp_path / "second", **sizes, start_from=first, training=still)
    read = [json.loads((tmp_path / name / "model" / "config.json").read_text()) for name in ("first", "second")]
    assert read[0] == read[1]
    with pytest.raises(InputError, match="reads in one direction only"):
        pretrain([path], tmp_path / "third", **sizes, objective="masked-token", start_from=first, training=still)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "window is 1; expected 2 to 512"),
        ({"window": 1024}, "window is 1024; expected 2 to 512"),
        ({"window": 400, "validation": "0.01"}, "longest stretch to validate on has 30 bases, less than a window"),
        ({"validation": "XIV"}, "validation names the record 'XIV', which the genomes do not have; they have one"),
        ({"validation": "2"}, "validation is 2; give a number between 0 and 1"),
        ({"leave_out": "one,four"}, "leave_out names the record 'four'"),
        ({"mask_fraction": 0.0}, "mask_fraction is 0.0"),
        ({"strands": "equivariant"}, "give --objective masked-token"),
        ({"objective": "masked-token", "mixer": "attention"}, "attention reads in one direction only"),
        ({"training": steps(carry_state=True)}, "windows are drawn at random"),
        ({"bed": "one\t10\n"}, "line 1 has 2 columns"),
        ({"bed": "four\t10\t20\n"}, "no record 'four'"),
        ({"bed": "one\t10\t9999\n"}, "10 to 9999 is no stretch of one, which has 3000 bases"),
        ({"bed": "one\t10\t99\ttrain\n"}, "no interval whose fourth column says valid"),
        ({"bed": "# nothing\n"}, "has no intervals"),
        ({"bed": b"\x1f\x8bxx"}, "is damaged|cut off"),
    ],
)
def test_bad_options_are_told_before_training(fasta, tmp_path, options, message, monkeypatch):
    path, _ = fasta
    monkeypatch.setattr("seqmodels.tasks.genomics.pretrain.fit", None)
    if "bed" in options:
        bed, content = tmp_path / "x.bed", options["bed"]
        bed.write_bytes(content if isinstance(content, bytes) else content.encode())
        options = {"bed": bed}
    with pytest.raises(InputError, match=message):
        pretrain([path], tmp_path / "run", **{**TINY, "training": steps(), **options})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (">a\nACGT\n>a\nACGT\n", "a record of this name came before"),
        (">a\nAC1T\n", "'1' at position 3 is no base"),
        (">a\n>b\nACGT\n", "'a' has no bases"),
        ("", "is empty"),
    ],
)
def test_a_genome_that_cannot_be_read_whole_is_refused(tmp_path, content, message):
    (tmp_path / "x.fa").write_text(content)
    with pytest.raises(InputError, match=message):
        read_genome([tmp_path / "x.fa"], tmp_path / "run")
    assert not (tmp_path / "run" / "genome.tokens").exists()
