import gzip
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

from seqmodels.tasks.genomics.datasets import Augmentation, training_data
from seqmodels.tasks.genomics.fasta import FastaReader
from seqmodels.tasks.genomics.labelled import load_labelled

EXAMPLES = Path(__file__).parents[2] / "examples"
CONTIGS = EXAMPLES / "contigs.fa.gz"

SPECIES = (
    "Escherichia coli",
    "Klebsiella pneumoniae",
    "Klebsiella quasipneumoniae",
    "Klebsiella variicola",
    "Salmonella enterica",
)


@pytest.fixture
def enterobacteria():
    return Path(os.environ["LONGSEQ_DATA"]) / "genomes" / "enterobacteria"


def test_the_example_contigs_say_that_they_are_simulated_and_show_every_column():
    records = list(FastaReader(CONTIGS))
    assert CONTIGS.stat().st_size <= 300_000
    assert len(records) == 12
    assert all(r.name.startswith("simulated_") and "Markov chain" in r.description for r in records)
    assert {name.replace("_", " ") for r in records for name in [r.name[10:-2]]} == set(SPECIES)
    assert all(2_000 <= r.counts.length <= 60_000 for r in records)
    for field in ("unknown", "ambiguous", "soft_masked"):
        assert 0 < sum(getattr(r.counts, field) > 0 for r in records) < 12


def make_contigs():
    spec = importlib.util.spec_from_file_location("make_contigs", EXAMPLES / "make_contigs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_chain_knows_what_follows_what():
    chain = make_contigs().transitions([np.tile(np.array([7, 8, 9, 10], dtype=np.uint8), 20_000)])
    context = int("01230123012", 4)  # after ACGTACGTACG comes T, 19,998 times
    assert np.diff(chain[context], prepend=0) == pytest.approx([*[0.02 / 19_998.08] * 3, 19_998.02 / 19_998.08])
    assert np.diff(chain[0], prepend=0) == pytest.approx([0.25] * 4)  # eleven A never came


@pytest.mark.data
def test_the_example_contigs_are_what_their_script_makes(enterobacteria, tmp_path, monkeypatch):
    module = make_contigs()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "make_contigs.py"))
    module.main()
    made, kept = (gzip.decompress((folder / "contigs.fa.gz").read_bytes()) for folder in (tmp_path, EXAMPLES))
    assert made == kept


@pytest.mark.data
def test_the_species_data_give_balanced_windows(enterobacteria):
    records = load_labelled(enterobacteria, split="train")
    assert records.classes == SPECIES
    assert [len(t) for t in records.tokens] == [4641652, 4857432, 5248520, 5142035, 5641239]
    data = training_data(
        records,
        [1024, 65536],
        batch_tokens=131072,
        validation_fraction=0.1,
        validation_windows=7,
        augment=Augmentation(),
        seed=0,
    )
    counts = [np.bincount(b["targets"].numpy(), minlength=5) for b in data.validation_batches()]
    assert np.sum(counts, axis=0).tolist() == [14] * 5
    assert {tuple(data.train_batch(step)["ids"].shape) for step in range(10)} == {(128, 1024), (2, 65536)}
