"""The shipped models: small enough, with cards, and able to do what they are shipped for."""

import csv
from pathlib import Path

import pytest
import torch

import seqmodels
from seqmodels.checkpoint import SHIPPED
from seqmodels.cli import main

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("name", "megabytes"), [("enterobacteria", 12), ("spoken-digits", 12)])
def test_a_shipped_model_is_small_and_has_a_card(name, megabytes):
    folder = SHIPPED / name
    assert (folder / "model.safetensors").stat().st_size <= megabytes * 1_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("licence", "Made again by", "Held-out figures", "Limits", "longseq"))


def test_the_example_contigs_get_their_species(tmp_path):
    assert (
        main(["dna", "classify", str(ROOT / "examples/contigs.fa.gz"), "-o", str(tmp_path / "t.tsv"), "--quiet"]) == 0
    )
    with (tmp_path / "t.tsv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    right = [row["label"].replace(" ", "_") in row["record_id"] for row in rows]
    assert len(rows) == 12
    assert all(right)


@torch.no_grad()
def test_the_digits_model_steps_as_it_reads():
    model = seqmodels.load("spoken-digits")
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    whole, _ = model(ids)
    state, steps = None, []
    for t in range(ids.shape[1]):
        logits, state = model(ids[:, t : t + 1], state)
        steps.append(logits)
    probabilities = torch.cat(steps, 1).softmax(-1)
    assert (probabilities - whole.softmax(-1)).abs().max() < 1e-3
