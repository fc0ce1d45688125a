"""The tasks of yeast ask what they say, on either strand."""

import numpy as np
import pytest
from Bio.Seq import Seq

from seqmodels.tasks.genomics.intervals import Interval

LONG = 3000


@pytest.fixture
def program():
    import yeast_tasks

    return yeast_tasks


def genome():
    """Bases, and a coding sequence of two exons on the reverse strand, the first of which begins with ATG."""
    bases = "".join(np.random.default_rng(0).choice(list("ACGT"), LONG))
    bases = bases[:1997] + "CAT" + bases[2000:]
    return bases, [Interval("I", 600, 1200, "gene", "-"), Interval("I", 1500, 2000, "gene", "-")]


def test_a_window_of_a_start_is_where_the_first_exon_begins(program):
    bases, known = genome()
    windows = list(program.start(bases, known, np.random.default_rng(0)))
    assert all(len(window) == 101 and window[49:52] == "ATG" for window, _ in windows)
    (begin,) = (window for window, label in windows if label)
    assert begin == str(Seq(bases[2000 + 49 - 101 : 2000 + 49]).reverse_complement())


def test_coding_windows_read_along_their_gene_and_no_other_touches_it(program):
    bases, known = genome()
    other = str(Seq(bases).reverse_complement())
    for window, label in program.coding(bases, known, np.random.default_rng(0)):
        place = bases.find(window) if window in bases else LONG - other.find(window) - 101
        covered = sum(max(0, min(place + 101, one.end) - max(place, one.start)) for one in known)
        assert covered == 101 * label
        assert window in other or not label
