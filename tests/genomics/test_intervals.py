"""Intervals and random access, against pysam, Biopython, and coordinates written down by hand."""

import gzip
import os
import pickle
import random
import re

import pysam
import pytest
from Bio import bgzf
from Bio.Seq import Seq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.fasta import FastaReader
from seqmodels.tasks.genomics.indexed import IndexedFasta
from seqmodels.tasks.genomics.intervals import Interval, parse_region, read_intervals
from seqmodels.tasks.genomics.pieces import Cut, Intervals, sliding
from seqmodels.tasks.genomics.tokens import decode, encode

GFF = """##gff-version 3
chr1\ttest\tgene\t1\t9\t.\t-\t.\tID=gene%3B1;Name=first
chr1\ttest\tCDS\t4\t6\t.\t+\t0\tParent=gene1;Name=b
chr2\ttest\texon\t7\t7\t.\t?\t.\tNote=none
##FASTA
>chr1
ACGT
"""
GTF = 'chr1\tx\texon\t3\t8\t.\t-\t.\tgene_id "g;1"; transcript_id "t1"; exon_number 2;\n'


def test_bed_gff_and_gtf_become_half_open_intervals_from_0(tmp_path):
    (tmp_path / "a.bed").write_bytes(
        b"\xef\xbb\xbftrack name=x\nbrowser position chr1\n# c\n\nchr1\t0\t9\tfirst\t0\t-\r\nchr1 3 6\ntrack\t1\t2\t.\n"
    )
    assert list(read_intervals(tmp_path / "a.bed")) == [
        Interval("chr1", 0, 9, "first", "-"), Interval("chr1", 3, 6, "chr1:4-6", "."),
        Interval("track", 1, 2, "track:2-2", "."),
    ]  # fmt: skip
    with bgzf.open(tmp_path / "a.gff3.gz", "wb") as file:
        file.write(GFF.encode())
    found = list(read_intervals(tmp_path / "a.gff3.gz"))
    assert found == [
        Interval("chr1", 0, 9, "gene;1", "-", "gene"), Interval("chr1", 3, 6, "b", "+", "CDS", "gene1"),
        Interval("chr2", 6, 7, "chr2:7-7", ".", "exon"),
    ]  # fmt: skip
    assert list(read_intervals(tmp_path / "a.gff3.gz", ["CDS", "exon"])) == found[1:]
    (tmp_path / "a.gtf").write_text(GTF)
    assert list(read_intervals(tmp_path / "a.gtf")) == [Interval("chr1", 2, 8, "t1", "-", "exon", "t1")]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.bed", "chr1\t1\t2\nchr1\t5\n", "a.bed, line 2 has 2 columns"),
        ("a.bed", "chr1\t-1\t5\n", "line 1: the start '-1' is not a whole number"),
        ("a.bed", "chr1\t1_0\t50\n", "the start '1_0' is not"),
        ("a.bed", "chr1\t1\t٣\n", "the end '٣' is not"),
        ("a.bed", "chr1\t1\t\x1d9\n", "the end '\\x1d9' is not"),
        ("a.bed", "chr1\x1d\t1\t9\n", "the first column, 'chr1\\x1d', is no name"),
        ("a.bed", "chr1\t5\t4\n", "the end 4 is before the start 5"),
        ("a.bed", "chr1\t5\t9\tx\t0\tminus\n", "the strand 'minus' is none of"),
        ("a.bed", "\t5\t9\n", "the first column, '', is no name"),
        ("a.bed", "chr1\0\t5\t9\n", "is a binary file"),
        ("a.bed", "x" * (1 << 20), "line 1 has 1048576 bytes or more"),
        ("a.gff", "chr1\tx\tgene\t0\t9\t.\t+\t.\tID=a\n", "the start is 0; GFF3 and GTF count from 1"),
        ("a.gff", "chr1\tx\tgene\t1\t\x1e9\t.\t+\t.\tID=a\n", "the end '\\x1e9' is not"),
        ("a.gff", "chr1\tx\tgene\t1\t9\t.\t\x1e+\t.\tID=a\n", "the strand '\\x1e+' is none of"),
        ("a.gff", "chr1\tx\tgene\t9\t8\t.\t+\t.\tID=a\n", "the end 8 is before the start 9"),
        ("a.gff", "chr1\t1\t2\n", "line 1 has 3 columns; GFF3 has 9"),
        ("a.gtf", "chr1\tx\tgene\t1\t8\t.\tx\t.\tID\n", "the strand 'x'"),
        ("b.bed", None, "b.bed does not exist"),
    ],
)
def test_a_bad_line_is_told_with_file_and_line(tmp_path, name, text, said):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(said)) as error:
        list(read_intervals(tmp_path / name))
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_intervals_that_are_cut_off_are_told(tmp_path):
    whole = gzip.compress(b"chr1\t1\t2\n" * 5000)
    (tmp_path / "a.bed.gz").write_bytes(whole[:-20])
    (tmp_path / "b.bed.gz").write_bytes(whole[:40] + b"\xff\xff\xff" + whole[43:])
    with bgzf.open(tmp_path / "c.bed.gz", "wb") as file:
        file.write(b"chr1\t1\t2\n" * 5000)
    (tmp_path / "c.bed.gz").write_bytes((tmp_path / "c.bed.gz").read_bytes()[:-28])  # the empty block at the end
    for name, said in (("a", "is cut off"), ("b", "is damaged"), ("c", "is cut off")):
        with pytest.raises(InputError, match=said):
            list(read_intervals(tmp_path / f"{name}.bed.gz"))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("chr1:1,000-2,000", ("chr1", 999, 2000)), ("chr1:7", ("chr1", 6, 5000)), ("chr1:-8", ("chr1", 0, 8)),
        ("chr1", ("chr1", 0, 5000)), ("chr1:5000-5100", ("chr1", 4999, 5100)), ("HLA:1-2", ("HLA:1-2", 0, 70)),
        ("HLA:1-2:3-3", ("HLA:1-2", 2, 3)), ("1:1-1", ("1", 0, 1)),
    ],
)  # fmt: skip
def test_regions_are_those_of_samtools(text, place):
    assert parse_region(text, {"chr1": 5000, "HLA:1-2": 70, "1": 9})[:3] == place


@pytest.mark.parametrize(
    "text", ["chr1:", "chr1:a-b", "chr1:0-5", "chr1:9-8", ":1-2", "chr1:1-2-3", "chr1:²-5", "chr1:+1-5"]
)
def test_a_bad_region_is_told(text):
    with pytest.raises(InputError, match="region '"):
        parse_region(text, {"chr1": 100})


def bases(seed, length, letters="ACGTacgtNRY"):
    return "".join(random.Random(seed).choices(letters, k=length))


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    """The same two sequences as plain FASTA, CRLF, BGZF, gzip, in lines of any length, and as pysam reads them."""
    folder = tmp_path_factory.mktemp("genome")
    sequences = {"chr1": bases(1, 3001), "chr2": bases(2, 60), "three": bases(3, 1)}

    def text(width, end="\n"):
        return "".join(
            f">{name} x{end}" + "".join(s[i : i + width] + end for i in range(0, len(s), width))
            for name, s in sequences.items()
        )

    (folder / "plain.fa").write_text(text(60))
    (folder / "crlf.fa").write_text(text(61, "\r\n"), newline="")
    (folder / "gzip.fa.gz").write_bytes(gzip.compress(text(60).encode()))
    with bgzf.open(folder / "bgzf.fa.gz", "wb") as file:
        file.write(text(60).encode())
    (folder / "ragged.fa").write_text(text(60).replace("\n", "\n\n", 7).replace(">chr2", "ACGT\n>chr2"))
    sequences["chr1"] += "ACGT"
    (folder / "whole.fa").write_text(text(100))
    return folder, pysam.FastaFile(str(folder / "whole.fa"))


@pytest.mark.parametrize("name", ["plain.fa", "crlf.fa", "gzip.fa.gz", "bgzf.fa.gz", "ragged.fa", "whole.fa"])
def test_any_stretch_is_the_one_that_pysam_fetches(genome, name, monkeypatch):
    folder, truth = genome
    opened = pickle.loads(pickle.dumps(IndexedFasta(folder / name)))
    length = 3005 if name in ("ragged.fa", "whole.fa") else 3001
    assert opened.lengths == {"chr1": length, "chr2": 60, "three": 1}
    draw = random.Random(name)
    monkeypatch.setattr("seqmodels.tasks.genomics.indexed.BLOCK", 100)
    for _ in range(60):
        seq = draw.choice(["chr1", "chr1", "chr2", "three"])
        end = {"chr1": 3001}.get(seq, opened.lengths[seq])
        a, b = sorted(draw.choices(range(end + 1), k=2))
        assert opened.fetch(seq, a, b).decode() == truth.fetch(seq, a, b)
        assert b"".join(opened.blocks(seq, a, b)).decode() == truth.fetch(seq, a, b)
        assert list(opened.blocks(seq, a, b, backwards=True)) == list(opened.blocks(seq, a, b))[::-1]
    assert opened.fetch("chr2", -3, 65).decode() == "NNN" + truth.fetch("chr2") + "NNNNN"
    assert opened.fetch("three", 5, 8) == b"NNN"


def test_an_index_is_made_once_and_again_when_the_file_has_changed(tmp_path):
    path = tmp_path / "x.fa"
    path.write_text(">a\nACGT\nAC\n")
    assert IndexedFasta(path).lengths == {"a": 6}
    made = (tmp_path / "x.fa.fai").stat()
    assert IndexedFasta(path).lengths == {"a": 6}
    assert (tmp_path / "x.fa.fai").stat() == made
    path.write_text(">b\nACG\n")
    os.utime(path, (made.st_mtime + 10, made.st_mtime + 10))
    assert IndexedFasta(path).lengths == {"b": 3}
    assert sorted(os.listdir(tmp_path)) == ["x.fa", "x.fa.fai"]


@pytest.mark.parametrize("name", ["plain.fa", "bgzf.fa.gz"])
def test_a_folder_that_may_not_be_written_to_gets_no_index(genome, tmp_path, name):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / name).write_bytes((genome[0] / name).read_bytes())
    folder.chmod(0o555)
    try:
        assert IndexedFasta(folder / name).fetch("chr2", 3, 9).decode() == genome[1].fetch("chr2", 3, 9)
        assert os.listdir(folder) == [name]
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(
    "text",
    [
        ">a\nACGT\nACGTA\n>b\nTTTGGGCCC\n",  # pyfaidx takes a longer last line for a shorter one
        ">a\nACGT\n\nACGT\n\n\n>b\nTTTG\nGG\n\n", ">a\nACGT\r\nACGT\nAC\r\n>b\nTG\r\nGC\r\n",
        ">a\nAC GT\nTC GA\nA\n>b\nTTT",
        ">a\nAC\tGT\n>b\n\tT>TT", ">a x\n\n\nACGT\nAC\n\x00>b\n>b y\nTGCA",
    ],
)  # fmt: skip
def test_lines_of_any_shape_give_the_bases_that_are_there(tmp_path, text):
    (tmp_path / "x.fa").write_text(text, newline="")
    truth = {record.name: bytes(record.tokens()) for record in FastaReader(tmp_path / "x.fa")}
    for _ in range(2):
        opened = IndexedFasta(tmp_path / "x.fa")
        for name, tokens in truth.items():
            for start in range(len(tokens)):
                assert bytes(encode(opened.fetch(name, start, len(tokens)))) == tokens[start:]
            assert opened.lengths[name] == len(tokens) or ">" in text.splitlines()[-2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b">a\nAC\n>a\nGT\n", "several sequences named"), (b"", "is empty"), (b"hello\n", "has no FASTA record"),
        (b"AC\n>a\nGT\n", "text before the first '>'"), (b">\nAC\n", "record 1 has no name"),
        (gzip.compress(b">a\n" + b"ACGT" * 5000)[:-12], "is cut off"), (b"@r\nAC\n+\nI\n", "is not whole FASTQ"),
    ],
)  # fmt: skip
def test_a_fasta_file_without_random_access_is_told(tmp_path, content, said):
    (tmp_path / "x.fa").write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        _ = IndexedFasta(tmp_path / "x.fa").lengths
    assert "\n" not in str(error.value)


def read(piece):
    tokens = piece.tokens if piece.rest is None else b"".join(part.tobytes() for part in piece.rest)
    return bytes(tokens), piece.describe()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_windows_of_an_interval_lie_where_they_say_on_either_strand(genome, monkeypatch, data):
    folder, truth = genome
    monkeypatch.setattr("seqmodels.tasks.genomics.indexed.BLOCK", data.draw(st.integers(1, 90)))
    seq = data.draw(st.sampled_from(["chr1", "chr2", "three"]))
    length = truth.get_reference_length(seq)
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length + 30))
    strand = data.draw(st.sampled_from("+-."))
    cut = data.draw(st.none() | st.builds(Cut, st.integers(1, 300), st.integers(1, 300)))
    source = Intervals([IndexedFasta(folder / "whole.fa")], [Interval(seq, start, end, "n", strand)], "x.bed", cut)
    longest = data.draw(st.sampled_from([1, 50, 10000]))
    found = [read(piece) for piece in source.pieces(longest)]
    window, stride = cut or (end - start, end - start)
    for tokens, row in found:
        a, b = row["start"], row["end"]
        expected = truth.fetch(seq, min(a, length), b) + "N" * (b - max(a, length) if b > length else 0)
        expected = str(Seq(expected).reverse_complement()) if strand == "-" else expected
        assert tokens == encode(expected.encode()).tobytes()
        assert (row["seq"], row["name"], row["strand"], row["length"]) == (seq, "n", strand, b - a)
        assert row["padded"] == max(0, b - length) - max(0, a - length)
        assert row["n_frac"] == pytest.approx(sum(c not in "ACGTacgt" for c in expected) / len(expected))
        assert row["softmask_frac"] == pytest.approx(sum(c.islower() for c in expected) / len(expected))
        assert row["ambiguous"] == sum(c in "RYry" for c in expected)
        assert (row["status"] == "only_n") == (set(decode(encode(expected.encode()))) == {"N"})
    offsets = [end - row["end"] if strand == "-" else row["start"] - start for _, row in found]
    assert offsets == expected_starts(end - start, window, stride)
    assert all(row["end"] - row["start"] == min(window, end - start) for _, row in found)


def expected_starts(length, window, stride):
    """Every stride; the first that would reach beyond the end is moved back, unless all bases have been read."""
    starts = []
    for start in range(0, length, stride):
        if start + window >= length:
            return [*starts, max(0, length - window)]
        starts.append(start)
    return starts


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 90), st.integers(1, 90), st.lists(st.integers(1, 60), min_size=1))
def test_windows_do_not_depend_on_how_a_sequence_comes(length, window, stride, sizes):
    tokens = encode(bases(length, length).encode())
    chunks, at = [], 0
    for size in sizes * length:
        chunks.append(tokens[at : at + size])
        at += size
    found = [(start, part.tobytes()) for start, part in sliding(iter(chunks), Cut(window, stride))]
    assert found == [(s, tokens[s : s + window].tobytes()) for s in expected_starts(length, window, stride)]


def test_intervals_that_are_nowhere_get_rows_that_say_so(genome):
    folder, _ = genome
    intervals = [
        Interval("chrX", 0, 5, "a"),
        Interval("chr2", 60, 70, "b"),
        Interval("chr2", 50, 70, "c"),
        Interval("chr2", 4, 4, "d"),
    ]
    rows = [piece.describe() for piece in Intervals([IndexedFasta(folder / "plain.fa")], intervals, "x").pieces(100)]
    assert [(row["name"], row["status"], row["note"]) for row in rows] == [
        ("a", "missing", "no sequence chrX in the FASTA, which has chr1, chr2, three"),
        ("b", "outside", "chr2 has 60 bases"),
        ("c", "ok", "10 of 20 bases lie beyond the end of chr2 and are read as N"),
        ("d", "empty", "no bases"),
    ]  # fmt: skip
    with pytest.raises(InputError, match="both have a sequence chr2"):
        Intervals([IndexedFasta(folder / name) for name in ("plain.fa", "whole.fa")], intervals, "x")


@pytest.mark.parametrize("strand", "+-")
@pytest.mark.parametrize("cut", [None, Cut(8, 4)])
def test_a_character_that_is_no_base_is_told_where_it_is(tmp_path, strand, cut):
    (tmp_path / "x.fa").write_text(">a\n" + "ACGT" * 5 + "\n" + "AC5T" * 5 + "\n")
    source = Intervals([IndexedFasta(tmp_path / "x.fa")], [Interval("a", 3, 40, "i", strand)], "x", cut)
    rows = [piece.describe() for piece in source.pieces(100)]
    assert (rows[-1]["status"], rows[-1]["note"]) == ("invalid", "'5' at position 23 of a is no base")
    assert {row["status"] for row in rows[:-1]} <= {"ok"}
    ends = [(row["start"], row["end"]) for row in rows]
    if strand == "-" or cut is None:
        assert ends == [(3, 40)]
    else:
        assert ends == [(3, 11), (7, 15), (11, 19), (15, 40)]
