import gzip
import os

import numpy as np
import pysam
import pytest

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.genome import read_genome
from seqmodels.tasks.genomics.vcf import Change, Problem, VcfReader, VcfWriter, names_of, normalised, read_change

HEADER = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"


@pytest.fixture
def make_genome(tmp_path):
    def make(**records):
        (tmp_path / "reference.fa").write_text("".join(f">{name}\n{text}\n" for name, text in records.items()))
        return read_genome([tmp_path / "reference.fa"])

    return make


def applied(text, change):
    return text[: change.start] + change.alt + text[change.start + len(change.ref) :]


def test_the_normal_form_makes_the_same_sequence_is_shortest_and_cannot_go_further_left(make_genome):
    rng = np.random.default_rng(0)
    for _ in range(60):
        text = "".join(rng.choice(list("AC"), 24))
        genome = make_genome(x=text)
        start = int(rng.integers(0, 20))
        ref = text[start : start + int(rng.integers(1, 5))]
        alt = "".join(rng.choice(list("AC"), int(rng.integers(1, 6))))
        if ref == alt:
            continue
        given = Change(0, start, ref, alt)
        found = normalised(genome, given)
        new = applied(text, given)
        assert applied(text, found) == new
        assert text[found.start : found.start + len(found.ref)] == found.ref
        same = [  # every way to say it, by trying all
            (len(text[s:e]) + len(new) - len(text) + (e - s), s)
            for s in range(len(text) + 1)
            for e in range(s, len(text) + 1)
            if len(new) - len(text) + (e - s) >= 0
            and text[:s] == new[:s]
            and text[e:] == new[len(new) - len(text) + e :]
        ]
        assert (len(found.ref) + len(found.alt), found.start) == min(same)
        pos, written_ref, written_alt = found.written(genome)
        assert applied(text, Change(0, pos - 1, written_ref, written_alt)) == new
        assert written_ref
        assert written_alt


def test_a_long_repeat_is_gone_through_to_its_start(make_genome):
    genome = make_genome(x="G" + "CAT" * 400 + "A")
    assert normalised(genome, Change(0, 1 + 3 * 350 + 1, "ATC", "")) == Change(0, 1, "CAT", "")
    assert normalised(make_genome(x="T" * 700), Change(0, 650, "", "TT")) == Change(0, 0, "", "TT")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("x\t3\t.\tG\tA", "ok"),
        ("chrx\t3\t.\tG\tA", "ok"),
        ("x\t3\t.\tg\ta", "ok"),
        ("x\t2\t.\tG\tA", "mismatch"),
        ("x\t0\t.\tG\tA", "outside"),
        ("x\t8\t.\tTA\tA", "outside"),
        ("x\t9\t.\tA\tC", "outside"),
        ("y\t3\t.\tG\tA", "no_record"),
        ("x\t3\t.\tG\t<DEL>", "symbolic"),
        ("x\t3\t.\tG\tG[x:5[", "symbolic"),
        ("x\t3\t.\tG\t*", "symbolic"),
        ("x\t3\t.\tG\t.", "symbolic"),
        ("x\t3\t.\tG\tG", "symbolic"),
        ("x\t3\t.\tG\tN", "invalid"),
        ("x\t3\t.\tR\tA", "invalid"),
        ("x\tthree\t.\tG\tA", "invalid"),
        ("x\t-3\t.\tG\tA", "invalid"),
        ("x 3 . G A", "invalid"),
    ],
)
def test_every_kind_of_line_has_its_status(make_genome, tmp_path, line, status):
    genome = make_genome(x="ACGTACGT")
    (tmp_path / "x.vcf").write_text(HEADER + line + "\n")
    (read,) = VcfReader(tmp_path / "x.vcf")
    change = read_change(genome, names_of(genome), read, 0)
    assert ("ok" if isinstance(change, Change) else change.status) == status


def test_deletions_at_both_ends_have_their_anchor_on_the_other_side(make_genome):
    genome = make_genome(x="ACGTT")
    assert Change(0, 0, "A", "").written(genome) == (1, "AC", "C")
    assert Change(0, 0, "", "GG").written(genome) == (1, "A", "GGA")
    assert Change(0, 4, "T", "").written(genome) == (4, "TT", "T")


@pytest.mark.data
def test_real_variants_are_read_as_pysam_reads_them_and_all_agree_with_the_reference():
    folder = os.path.join(os.environ["LONGSEQ_DATA"], "variants/human_chr20_1mb")
    genome = read_genome([os.path.join(folder, "z.fa.gz")])
    names = names_of(genome)
    statuses = []
    with pysam.VariantFile(os.path.join(folder, "z.vcf.gz")) as file:
        for line, theirs in zip(VcfReader(os.path.join(folder, "z.vcf.gz")), file, strict=True):
            mine = (line.field("CHROM"), int(line.field("POS")), line.field("REF"), line.alternatives)
            assert mine == (theirs.chrom, theirs.pos, theirs.ref, theirs.alts)
            for allele in range(len(line.alternatives)):
                assert float(line.info("AF", allele)) == pytest.approx(theirs.info["AF"][allele], rel=1e-5)
                change = read_change(genome, names, line, allele)
                statuses.append(change.status if isinstance(change, Problem) else "ok")
    assert set(statuses) == {"ok", "symbolic"}


@pytest.mark.parametrize("suffix", [".vcf", ".vcf.gz"])
def test_a_written_file_holds_every_line_and_pysam_reads_the_new_values(tmp_path, suffix):
    lines = ["x\t3\trs1\tG\tA,T\t50\tPASS\tAC=1,2;DB\tGT\t0|1", "x\t4\t.\tT\tC", "x\tbad\t.\tT\tC\t.\t.\t."]
    (tmp_path / "in.vcf").write_text(
        HEADER.replace("#CHROM", '##INFO=<ID=AC,Number=A,Type=Integer,Description="count">\n'
                       '##INFO=<ID=DB,Number=0,Type=Flag,Description="known">\n'
                       '##FORMAT=<ID=GT,Number=1,Type=String,Description="genotype">\n##contig=<ID=x>\n#CHROM')
        .replace("INFO\n", "INFO\tFORMAT\tone\n") + "\n".join(lines) + "\n"
    )  # fmt: skip
    reader = VcfReader(tmp_path / "in.vcf")
    with VcfWriter(tmp_path / f"out{suffix}", {"LS_X": ("Float", "a score")}) as writer:
        for i, line in enumerate(reader):
            if i == 0:
                writer.start(reader.header)
            values = [{"LS_X": "0.5"}, {"LS_X": None}][: len(line.alternatives)]
            writer.write(line, values)
    opened = gzip.open if suffix.endswith("gz") else open
    with opened(tmp_path / f"out{suffix}", "rt") as file:
        text = file.read()
    assert text.splitlines()[-1] == lines[2]
    (tmp_path / "good.vcf").write_text(text.replace(lines[2] + "\n", "").replace("x\t4\t.\tT\tC\t.\t.\tLS_X=0.5\n", ""))
    with pysam.VariantFile(str(tmp_path / "good.vcf")) as file:
        (record,) = file
    assert record.info["LS_X"] == (0.5, None)
    assert record.info["AC"] == (1, 2)
    assert record.info["DB"]
    if suffix.endswith("gz"):
        assert (tmp_path / "out.vcf.gz").read_bytes()[12:14] == b"BC"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b">x\nACGT\n", "line 1: 1 columns, separated by tabs"),
        (gzip.compress(b"BCF\x02\x02rest"), "is BCF"),
        (gzip.compress((HEADER + "x\t3\t.\tG\tA\n").encode() * 50)[:-30], "cut off or damaged"),
        (b"\x00\x01\x02", "is not text"),
        (b"PK\x03\x04", "is not VCF but a zip archive"),
    ],
)
def test_what_is_no_vcf_is_told_in_one_line(tmp_path, content, message):
    (tmp_path / "x.vcf").write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(VcfReader(tmp_path / "x.vcf"))


def test_a_file_cut_between_two_blocks_is_told_after_its_good_lines(tmp_path):
    with pysam.BGZFile(str(tmp_path / "x.vcf.gz"), "w") as file:
        file.write((HEADER + "x\t3\t.\tG\tA\n").encode())
    (tmp_path / "x.vcf.gz").write_bytes((tmp_path / "x.vcf.gz").read_bytes()[:-28])
    lines = iter(VcfReader(tmp_path / "x.vcf.gz"))
    assert next(lines).field("POS") == "3"
    with pytest.raises(InputError, match="cut off or damaged"):
        next(lines)
