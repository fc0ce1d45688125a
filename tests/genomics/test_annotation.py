"""Labels per base from annotation, against reading the same lines base by base."""

import gzip
import os
import re

import numpy as np
import pytest
from Bio.Seq import Seq

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.annotation import label_bases

LENGTHS = {"chr1": 400, "chr2": 150, "plain": 60}
FEATURES = ("CDS", "exon", "gene")


def random_lines(seed, n=30):
    """(seq, feature, first, last, strand) of n lines, from 1, the last base included."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        seq = ["chr1", "chr2"][int(rng.integers(2))]
        first = int(rng.integers(1, LENGTHS[seq] + 1))
        last = min(LENGTHS[seq], first + int(rng.integers(0, 40)))
        rows.append((seq, [*FEATURES, "tRNA"][int(rng.integers(4))], first, last, "+-"[int(rng.integers(2))]))
    return rows


def gff3(path, rows, attributes=lambda i: f"ID=x{i}"):
    lines = [f"{s}\tx\t{f}\t{a}\t{b}\t.\t{strand}\t.\t{attributes(i)}" for i, (s, f, a, b, strand) in enumerate(rows)]
    path.write_text("##gff-version 3\n" + "\n".join(lines) + "\n")
    return path


def gtf(path, rows):
    return gff3(path, rows, lambda i: f'gene_id "g{i}"; transcript_id "t{i}";')


def bed(path, rows):
    path.write_text("".join(f"{s}\t{a - 1}\t{b}\t{f}\t0\t{strand}\n" for s, f, a, b, strand in rows))
    return path


def slowly(rows, seq, position, stranded):
    """The class of a base, which counts from 1, by looking at every line."""
    for feature in FEATURES:
        strands = {strand for s, f, a, b, strand in rows if (s, f) == (seq, feature) and a <= position <= b}
        if strands and stranded:
            return feature + strands.pop() if len(strands) == 1 else None
        if strands:
            return feature
    return "background"


@pytest.mark.parametrize("stranded", [False, True])
@pytest.mark.parametrize("write", [gff3, gtf, bed])
def test_each_base_has_the_first_feature_that_covers_it_in_every_format(tmp_path, write, stranded):
    rows = random_lines(seed=1)
    path = write(tmp_path / f"a.{write.__name__}", rows)
    labels = label_bases([path], FEATURES, LENGTHS, stranded=stranded)
    assert list(labels.classes) == sorted(labels.classes)
    for seq in ("chr1", "chr2"):
        want = [slowly(rows, seq, position, stranded) for position in range(1, LENGTHS[seq] + 1)]
        found = labels.of(seq, 0, LENGTHS[seq])
        assert [labels.classes[i] if i >= 0 else None for i in found] == want
        for start, end in ((0, 1), (3, 77), (LENGTHS[seq] - 1, LENGTHS[seq]), (50, 50)):
            np.testing.assert_array_equal(labels.of(seq, start, end), found[start:end])
    assert (labels.of("plain", 0, 60) == -100).all()  # nobody says that it was annotated


@pytest.mark.parametrize("stranded", [False, True])
def test_labels_of_the_reverse_complement_are_those_of_annotation_turned_round(tmp_path, stranded):
    rows = random_lines(seed=2)
    other = [(s, f, LENGTHS[s] + 1 - b, LENGTHS[s] + 1 - a, "+-"[strand == "+"]) for s, f, a, b, strand in rows]
    given, turned = (
        label_bases([gff3(tmp_path / name, lines)], FEATURES, LENGTHS, stranded=stranded)
        for name, lines in (("a.gff3", rows), ("b.gff3", other))
    )
    for seq in ("chr1", "chr2"):
        np.testing.assert_array_equal(given.turned(given.of(seq, 0, LENGTHS[seq])), turned.of(seq, 0, LENGTHS[seq]))


def test_introns_are_the_gaps_between_the_exons_of_each_transcript(tmp_path):
    rows = [("chr1", "exon", 11, 20, "+"), ("chr1", "exon", 31, 40, "+"), ("chr1", "exon", 51, 60, "+"),
            ("chr1", "exon", 35, 54, "+"), ("chr2", "CDS", 5, 9, "-"), ("chr2", "CDS", 13, 20, "-")]  # fmt: skip
    parents = ["t1", "t1", "t1,t2", "t2", "t3", "t3"]  # t2: 35-54 and 51-60 overlap, no gap; t3 has no exons
    path = gff3(tmp_path / "a.gff3", rows, lambda i: f"ID=e{i};Parent={parents[i]}")
    labels = label_bases([path], ("exon", "intron"), LENGTHS)
    names = "".join("bei"[("background", "exon", "intron").index(labels.classes[i])] for i in labels.of("chr1", 0, 70))
    assert names == "b" * 10 + "e" * 10 + "i" * 10 + "e" * 30 + "b" * 10
    found = label_bases([path], ("CDS", "intron"), LENGTHS).of("chr2", 0, 25)
    assert re.sub("[^2]", ".", "".join(map(str, found))) == "." * 9 + "222" + "." * 13
    text = path.read_text()
    path.write_text(text + "chr1\tx\tintron\t1\t3\t9\t+\t.\tName=RNA-seq\n")
    np.testing.assert_array_equal(label_bases([path], ("exon", "intron"), LENGTHS).of("chr1", 0, 70),
                                  labels.of("chr1", 0, 70))  # fmt: skip
    path.write_text(text + "chr1\tx\tintron\t1\t3\t.\t+\t.\tParent=t1\n")
    assert (label_bases([path], ("exon", "intron"), LENGTHS).of("chr1", 0, 30) == 2).tolist() == [True] * 3 + [
        False
    ] * 27


def test_bases_are_known_only_within_the_intervals_that_are_given(tmp_path):
    path = bed(tmp_path / "a.bed", [("chr1", "any name", 11, 20, ".")])
    (tmp_path / "within.bed").write_text("chr1\t5\t15\nchr1\t14\t18\n")
    labels = label_bases([path], ("CDS",), LENGTHS, within=tmp_path / "within.bed").of("chr1", 0, 30)
    assert labels.tolist() == [-100] * 5 + [1] * 5 + [0] * 8 + [-100] * 12
    alone = label_bases([path], ("CDS",), LENGTHS, stranded=True)
    assert alone.of("chr1", 9, 21).tolist() == [2] + [-100] * 10 + [2]  # its strand is not said


@pytest.mark.parametrize(
    ("rows", "features", "said"),
    [
        ([("chr1", "CDS", 390, 401, "+")], "CDS", "ends at 401, beyond chr1 of 400 bases"),
        ([("chrX", "CDS", 1, 9, "+")], "CDS", "annotates none of the sequences, but chrX; the FASTA has chr1, chr2"),
        ([("chr1", "gene", 1, 9, "+")], "CDS,gene", "has no CDS in these sequences"),
        ([("chr1", "gene", 1, 9, "+")], "gene,gene", "features are 'gene,gene'"),
        ([("chr1", "gene", 1, 9, "+")], "background", "features are 'background'"),
    ],
)
def test_annotation_that_does_not_fit_is_told_in_one_line(tmp_path, rows, features, said):
    with pytest.raises(InputError, match=re.escape(said)) as error:
        label_bases([gff3(tmp_path / "a.gff3", rows)], features.split(","), LENGTHS)
    assert "\n" not in str(error.value)


@pytest.mark.data
def test_coding_bases_of_e_coli_begin_with_start_codons_and_are_those_of_a_plain_reading():
    folder = os.path.join(os.environ["LONGSEQ_DATA"], "genomes/enterobacteria/ecoli_K12_MG1655")
    with gzip.open(f"{folder}.fa.gz", "rt") as file:
        sequence = "".join(line.strip() for line in file if not line.startswith(">"))
    with gzip.open(f"{folder}.gff.gz", "rt") as file:
        rows = [line.split("\t") for line in file if not line.startswith("#")]
    coding = [(int(row[3]), int(row[4]), row[6]) for row in rows if row[2] == "CDS"]
    want = bytearray(len(sequence))
    for first, last, strand in coding:
        for position in range(first, last + 1):  # from 1, the last included
            want[position - 1] |= 1 if strand == "+" else 2
    lengths = {"NC_000913.3": len(sequence)}
    labels = label_bases([f"{folder}.gff.gz"], ("CDS",), lengths, stranded=True)
    found = labels.of("NC_000913.3", 0, len(sequence))
    assert labels.classes == ("CDS+", "CDS-", "background")
    np.testing.assert_array_equal(found, np.array([2, 0, 1, -100])[np.frombuffer(bytes(want), dtype=np.uint8)])
    starts = np.flatnonzero((found[1:] == 0) & (found[:-1] == 2)) + 1
    ends = np.flatnonzero((found[:-1] == 1) & (found[1:] == 2)) + 1
    codons = [sequence[a : a + 3] for a in starts] + [str(Seq(sequence[b - 3 : b]).reverse_complement()) for b in ends]
    assert np.mean([codon in ("ATG", "GTG", "TTG") for codon in codons]) > 0.97
