"""benchmarks/gue_joint.py: one table of several tasks tells nothing of what is held out."""

import sys

import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.labelled import load_labelled
from seqmodels.tasks.genomics.tokens import decode


def test_tasks_are_joined_without_what_overlaps_dev_or_test_of_any(tmp_path, monkeypatch, capsys):
    import gue_joint

    drawn = np.random.default_rng(0).choice(list("ACGT"), (7, 60))
    one, two, both, near, turned, in_dev, in_test = map("".join, drawn)
    near = near[:37] + in_dev[20:43]  # 23 bases of it
    overlapping = one[:20] + in_dev[30:54]
    turned = gue_joint.reverse_complement(in_test)[5:40] + turned
    splits = {
        "a/train": {one: 1, both: 0, overlapping: 1},
        "a/dev": {in_dev: 1},
        "a/test": {one[:23]: 0},  # too short to share a window
        "b/train": {two: 0, both.lower(): 1, near: 1, turned: 0},
        "b/dev": {two[:10]: 0},
        "b/test": {in_test: 1},
    }
    for name, rows in splits.items():
        path = tmp_path / "gue" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("sequence,label\n" + "".join(f"{text},{label}\n" for text, label in rows.items()))
    monkeypatch.setattr(sys, "argv", ["gue_joint.py", str(tmp_path / "gue"), str(tmp_path / "joint")])
    gue_joint.main()
    assert "4 of 6 training sequences" in capsys.readouterr().err
    records = load_labelled(tmp_path / "joint", split="train", targets="multi")
    assert records.classes == ("a", "b")
    labels = {decode(tokens): row.tolist() for tokens, row in zip(records.tokens, records.labels, strict=True)}
    unknown = pytest.approx(np.nan, nan_ok=True)
    assert labels == {one: [1, unknown], two: [unknown, 0], both: [0, 1], near: [unknown, 1]}
    (tmp_path / "gue" / "b" / "test.csv").write_text(f"sequence,label\n{in_test},2\n")
    with pytest.raises(InputError, match="other labels than 0 and 1"):
        gue_joint.main()
