"""Damaged input of every format gives what is in it, or one clear line; also as many as one likes:

    python tests/genomics/test_mutations.py --format vcf --number 100000 --seed 0

Valid files of random content are damaged: bytes, lines and columns changed, lost, doubled, cut off, compressed. What
is then read is compared with a plain reading of the same bytes, and with pysam and Biopython where these read them at
all: no record lost or made up, no coordinate off by one, no wrong strand. What is not read must be told by an
InputError of one printable line. A failure ends the program, with the bytes and the number of the file.
"""

import argparse
import contextlib
import gzip
import io
import os
import random
import re
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

os.environ.setdefault("POLARS_MAX_THREADS", "1")

import pysam
import pytest
from Bio import BiopythonDeprecationWarning, SeqIO
from Bio.Seq import Seq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.errors import InputError
from seqmodels.tasks.genomics.fasta import FastaReader
from seqmodels.tasks.genomics.genome import read_genome
from seqmodels.tasks.genomics.indexed import IndexedFasta
from seqmodels.tasks.genomics.intervals import Interval, parse_region, read_intervals
from seqmodels.tasks.genomics.labelled import load_labelled
from seqmodels.tasks.genomics.pieces import Intervals, Records
from seqmodels.tasks.genomics.tokens import decode, reverse_complement
from seqmodels.tasks.genomics.variants import windows_of
from seqmodels.tasks.genomics.vcf import Change, VcfReader, VcfWriter, names_of, read_change

GENOME = {"chr1": "ACGTNACGTAACCGGTT" * 4, "chr2": "GGCAT", "MT": "ACCA" * 9}
WHITE = str.maketrans("", "", " \t\r\n")


def bases(rng, low, high, letters="ACGT"):
    return "".join(rng.choices(letters, k=rng.randint(low, high)))


def plain(text):
    """The bases of a text as the table of tokens.py has them, or None where it has none."""
    text = text.translate(WHITE)
    if not re.fullmatch(r"[ACGTUNRYSWKMBDHVXacgtunryswkmbdhvx.*?-]*", text):
        return None
    return re.sub("[^ACGT]", "N", text.upper().replace("U", "T"))


def other_strand(text):
    return str(Seq(text).reverse_complement())


# What is damaged, and how


def fasta(rng):
    lines = []
    for i in range(rng.randint(1, 5)):
        sequence, width = bases(rng, 0, 90, "ACGTacgtNR"), rng.choice([10, 60])
        lines += [f">r{i} text", *(sequence[k : k + width] for k in range(0, len(sequence), width))]
    return "\n".join(lines) + "\n"


def bed(rng):
    lines = []
    for i in range(rng.randint(1, 6)):
        seq, start = rng.choice(list(GENOME)), rng.randint(0, 40)
        columns = [seq, str(start), str(start + rng.randint(0, 40)), f"n{i}", "0", rng.choice("+-.")]
        lines.append("\t".join(columns[: rng.choice([3, 4, 6, 6])]))
    return "\n".join([*rng.choice([[], ["track name=x"], ["# text"]]), *lines]) + "\n"


def gff(rng, gtf=False):
    lines = [] if gtf else ["##gff-version 3"]
    for i in range(rng.randint(1, 6)):
        start = rng.randint(1, 40)
        name = f'gene_id "g{i}"; transcript_id "t{i}";' if gtf else f"ID=f{i};Name=n"
        place = [str(start), str(start + rng.randint(0, 40)), ".", rng.choice("+-."), "."]
        lines.append("\t".join([rng.choice(list(GENOME)), "x", rng.choice(["gene", "CDS"]), *place, name]))
    return "\n".join(lines) + "\n"


def vcf(rng):
    lines = ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    for _ in range(rng.randint(1, 6)):
        seq = rng.choice(list(GENOME))
        start = rng.randrange(len(GENOME[seq]))
        ref = GENOME[seq][start : start + rng.choice([1, 1, 2, 6])]
        alts = rng.choices([bases(rng, 1, 4), ref[0], ref + bases(rng, 1, 3), "<DEL>", "*"], [5, 2, 2, 1, 1], k=2)
        alt = ",".join(alts[: rng.randint(1, 2)])
        name = rng.choice([seq, seq.removeprefix("chr")])
        lines.append(f"{name}\t{start + 1}\trs1\t{ref}\t{alt}\t50\tPASS\tAF={'0.1,0.2' if ',' in alt else '0.5'}")
    return "\n".join(lines) + "\n"


def table(rng, separator=","):
    rows = [("sequence", "label"), *((bases(rng, 1, 40, "ACGTNacgt"), rng.choice("01")) for _ in range(8))]
    rows = [(*row, "x") for row in rows] if rng.random() < 0.2 else rows
    return "\n".join(separator.join(row) for row in rows) + "\n"


def nt(rng):
    return "".join(f">s{i}|{rng.choice('01')}\n{bases(rng, 1, 60)}\n" for i in range(rng.randint(1, 6)))


def region(rng):
    return rng.choice(["chr1:3-30", "chr1:1,0-4,0", "MT:7", "chr2:-4", "chr2"])


def damaged(rng, text, alphabet):
    """Bytes of a text after some accidents."""
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        at, way = rng.randrange(len(data) + 1), rng.randrange(12)
        lines = data.splitlines(keepends=True)
        line = rng.randrange(len(lines)) if lines else 0
        if way == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif way == 1:
            del data[at : at + rng.randint(1, 6)]
        elif way <= 4:
            data[at:at] = "".join(rng.choices(alphabet, k=rng.randint(1, 4))).encode()
        elif way == 5 and lines:  # a line twice, or at another place
            lines.insert(rng.randrange(len(lines)), lines[line] if rng.random() < 0.5 else lines.pop(line))
            data = bytearray(b"".join(lines))
        elif way == 6 and lines:  # a column lost or doubled
            columns = lines[line].split(b"\t" if b"\t" in lines[line] else b",")
            place = rng.randrange(len(columns))
            columns[place : place + 1] = [] if rng.random() < 0.5 else [columns[place]] * 2
            lines[line] = (b"\t" if b"\t" in lines[line] else b",").join(columns)
            data = bytearray(b"".join(lines))
        elif way == 7:
            data = data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b" \n"]), rng.choice([1, -1]))
        elif way == 8:
            del data[at:]
        elif way == 9:  # a number that is another one
            numbers = list(re.finditer(rb"\d+", data))
            if numbers:
                found, value = rng.choice(numbers), rng.choice([b"0", b"-1", b"1e3", b"9" * 19, b"007", b"1.0", b"2"])
                data[found.start() : found.end()] = value
        elif way == 10:
            data[at:at] = rng.choice([b"\xef\xbb\xbf", b"\xff", b"\0", "é٣".encode(), b"\x1b[2J", b'"', b"\x0b"])
        elif way == 11:
            data += data[at:]
    return bytes(data)


# What must be true of it


def read_fasta(path, data):
    """Records as lines say, as Biopython says, any stretch of either strand as pysam fetches it."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode("latin-1")
    rows = [(piece.tokens, piece.describe()) for piece in Records(path).pieces(10**9)]
    blocks = re.split(r"(?m)^>", text, flags=re.ASCII)[1:] if "\r" not in text.replace("\r\n", "") else None
    if blocks is not None:
        blocks = ("\n" + text).split("\n>")[1:]
        assert len(rows) == len(blocks)
        for (tokens, row), block in zip(rows, blocks, strict=True):
            expected = plain(block.partition("\n")[2])
            assert (row["status"] == "invalid") == (expected is None)
            if expected is not None:
                assert decode(tokens) == expected
                assert row["length"] == len(expected)
    if all(row["status"] in ("ok", "duplicate", "empty", "only_n") for _, row in rows) and text.isascii():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BiopythonDeprecationWarning)
            theirs = list(SeqIO.parse(io.StringIO(text.lstrip(), newline=None), "fasta"))
        if "\r" not in text:
            assert [plain(str(record.seq)) for record in theirs] == [decode(tokens) for tokens, _ in rows]
    fasta_file = IndexedFasta(path)
    lengths = fasta_file.lengths
    try:  # which takes white space for bases, and 9 bases with \r\n for a line like 10 with \n
        assert not re.search(rb"(?m)^[^>]*([ \t]|\r(?!\n))", data)
        assert data.count(b"\r\n") in (0, data.count(b"\n"))
        pysam.faidx(str(path), "-o", f"{path}.theirs.fai")
        theirs = pysam.FastaFile(str(path), filepath_index=f"{path}.theirs.fai")
    except (AssertionError, pysam.SamtoolsError, OSError, ValueError):
        theirs = None
    for (tokens, row), (name, length) in zip(rows, lengths.items(), strict=True):
        assert (row["record_id"], row["status"] == "invalid" or len(tokens)) in {(name, True), (name, length)}
        if row["status"] != "invalid" and length:
            start, end = sorted((length // 3, length - length // 4))
            (piece,) = Intervals([fasta_file], [Interval(name, start, end, "i", "-")], "x").pieces(10**9)
            assert decode(piece.tokens) == other_strand(decode(tokens[start:end]))
            if theirs is not None and name in theirs.references and theirs.get_reference_length(name) == length:
                assert plain(theirs.fetch(name, start, end)) == decode(tokens[start:end])
    if theirs is not None:
        theirs.close()


def intervals_of(parser, path):
    """Place and strand of lines as pysam reads them; None where it does not."""
    with open(path, "rb") as file, contextlib.suppress(Exception):
        return [
            (i.contig.strip(), i.start, i.end, getattr(i, "strand", ".")) for i in pysam.tabix_iterator(file, parser)
        ]
    return None


def check_intervals(path, expected, theirs):
    """What is read lies where it is said, and has the bases of its strand."""
    found = list(read_intervals(path))
    assert [(i.seq, i.start, i.end, i.strand) for i in found] == expected
    if theirs is not None and len(theirs) == len(found):
        name = unquote if path.suffix == ".gff3" else str
        assert [(name(seq), start, end) for seq, start, end, _ in theirs] == [place[:3] for place in expected]
    source = Intervals([FASTA], found, path.name)
    for interval, piece in zip(found, source.pieces(10**9), strict=True):
        row, whole = piece.describe(), GENOME.get(interval.seq)
        if whole is None or interval.start >= len(whole):
            assert row["status"] == ("missing" if whole is None else "outside")
        elif interval.end - interval.start < 10**6:
            inside = whole[interval.start : interval.end]
            text = inside + "N" * (interval.end - interval.start - len(inside))
            assert decode(piece.tokens) == (other_strand(text) if interval.strand == "-" else text)
            assert (row["start"], row["end"]) == (interval.start, interval.end)


def data_lines(data):
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    return [line.rstrip("\r") for line in text.split("\n")]


def read_bed(path, data):
    list(read_intervals(path))  # what is no interval is told
    expected = []
    for line in data_lines(data):
        if not line or line.startswith("#") or re.match(r"(track|browser)\b(?!\t)", line):
            continue
        columns = [column.strip() for column in (line.split("\t") if "\t" in line else line.split())]
        strand = columns[5] if len(columns) > 5 else ""
        expected.append((columns[0], columns[1], columns[2], strand or "."))
    expected = [(seq, int(start), int(end), strand) for seq, start, end, strand in expected]
    check_intervals(path, expected, intervals_of(pysam.asBed(), path) if b"\t" in data else None)


def read_gff(path, data):
    list(read_intervals(path))
    expected = []
    for line in data_lines(data):
        if line.startswith((">", "##FASTA")):
            break
        if line and not line.startswith("#"):
            expected.append([column.strip() for column in line.split("\t")])
    name = unquote if path.suffix == ".gff3" else str
    places = [(name(c[0]), int(c[3]) - 1, int(c[4]), c[6].replace("?", ".")) for c in expected]
    check_intervals(path, places, intervals_of(pysam.asGTF() if path.suffix == ".gtf" else pysam.asGFF3(), path))


def read_region(path, data):
    text = data.decode("utf-8", "replace")
    interval = parse_region(text, {name: len(sequence) for name, sequence in GENOME.items()})
    found = re.fullmatch(r"(.*):([0-9,]*)(-?)([0-9,]*)", text, re.DOTALL)
    if text in GENOME or ":" not in text:
        assert interval[:3] == (text, 0, len(GENOME.get(text, "")))
        return
    seq, first, _, last = (part.replace(",", "") for part in found.groups())
    assert (interval.seq, interval.start) == (found[1], int(first or 1) - 1)
    if last:
        assert interval.end == int(last)
    if seq in GENOME and last and interval.end <= len(GENOME[seq]):
        assert FASTA.fetch(seq, interval.start, interval.end).decode() == PYSAM.fetch(
            region=f"{seq}:{first or 1}-{last}"
        )


def applied(text, start, ref, alt):
    return text[:start] + alt + text[start + len(ref) :]


def read_vcf(path, data):
    """A line of the file for each line that is read, an allele for each ALT, its change the one that is spelled out."""
    reader = VcfReader(path)
    lines = list(reader)
    kept = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip() and line[:1] != b"#"]
    assert [line.encode(errors="surrogateescape") for line in map("\t".join, (line.fields for line in lines))] == [
        line.rstrip(b"\r\n") for line in kept
    ]
    with contextlib.suppress(OSError, ValueError, NotImplementedError), pysam.VariantFile(str(path)) as file:
        theirs = [(record.chrom, record.pos, record.ref, record.alts) for record in file]
        told = [(line.field("CHROM"), line.field("POS"), line.field("REF"), line.alternatives) for line in lines]
        if len(theirs) == len(told) and not any(line.problem for line in lines):
            told = [(seq, int(pos), ref, tuple(alt or "." for alt in alts)) for seq, pos, ref, alts in told]
            assert [(*place, tuple(alt or "." for alt in alts or ("",))) for *place, alts in theirs] == told
    out = path.with_suffix(".out.vcf")
    with VcfWriter(out, {"LS_X": ("Float", "x")}) as writer:
        writer.start(reader.header)
        for line in lines:
            writer.write(line, [{"LS_X": "1"}] * len(line.alternatives))
            for allele, alt in enumerate(line.alternatives):
                check_allele(line, alt, read_change(GENOMES, NAMES, line, allele))
    written = [line.fields[:5] for line in VcfReader(out)]
    assert written == [line.fields[:5] for line in lines]


def check_allele(line, alt, found):
    """The change makes the sequence that the line describes; otherwise its status is the one by plain comparison."""
    seq = next((s for s in GENOME if line.field("CHROM") in (s, s.removeprefix("chr"), f"chr{s}")), None)
    seq = "MT" if line.field("CHROM") in ("M", "chrM") else seq
    ref, whole = line.field("REF").upper(), GENOME.get(seq or "", "")
    if line.problem or not re.fullmatch("[ACGTNacgtn]+", line.field("REF")):
        status = "invalid"
    elif alt == "" or re.search(r"[<>\[\]*.]", alt):
        status = "symbolic"
    elif not re.fullmatch("[ACGTacgt]+", alt):
        status = "invalid"
    elif seq is None:
        status = "no_record"
    else:
        start = int(line.field("POS")) - 1
        inside = start >= 0 and start + len(ref) <= len(whole)
        status = "outside" if not inside else "mismatch" if whole[start : start + len(ref)] != ref else "ok"
        status = "symbolic" if status == "ok" and ref == alt.upper() else status
    if status != "ok":
        assert not isinstance(found, Change)
        assert found.status == status
        assert found.note.isprintable()
        return
    assert isinstance(found, Change)
    new = applied(whole, start, ref, alt.upper())
    assert applied(whole, found.start, found.ref, found.alt) == new
    pos, written_ref, written_alt = found.written(GENOMES)
    assert applied(whole, pos - 1, written_ref, written_alt) == new
    if max(len(found.ref), len(found.alt)) <= 16:
        pair, (first, _), _ = windows_of(GENOMES, found, 32)
        wide, at = "N" * 40 + whole + "N" * 80, 40 + found.start - first
        assert decode(pair[0]) == wide[at : at + 32]
        assert decode(pair[1]) == ("N" * 40 + new + "N" * 80)[at : at + 32]
        assert decode(reverse_complement(pair[0])) == other_strand(decode(pair[0]))


def same_table(records, data):
    """The rows of a table as its lines say; nothing with quotes, whose meaning is another's, is compared."""
    text = re.sub("\r\n?", "\n", data.decode("utf-8").removeprefix("\ufeff"))
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip(" \t,")]
    separator = "\t" if "\t" in lines[0][1] else ","
    if '"' in text:  # but a line that looks like a row is one
        rows = [line for _, line in lines[1:] if line.count(separator) == lines[0][1].count(separator)]
        assert sum('"' not in line for line in rows) <= len(records.names) < len(lines)
        return
    header, *rows = ([cell.strip(" \t") for cell in line.split(separator)] for _, line in lines)
    sequence, label = header.index("sequence" if "sequence" in header else "seq"), header.index("label")
    found = [(decode(t), records.classes[k]) for t, k in zip(records.tokens, records.labels, strict=True)]
    assert found == [(plain(row[sequence]), row[label]) for row in rows]
    assert records.names == [f"row_{number}" for number, _ in lines[1:]]


def read_table(path, data):
    same_table(load_labelled(path), data)


def read_gue(path, data):
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text("sequence,label\nACGT,0\nACGG,1\n")
    (folder / "test.csv").write_bytes(data)
    assert load_labelled(folder, split="train").names == ["row_2", "row_3"]
    same_table(load_labelled(folder, split="test"), data)


def read_nt(path, data):
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    records = load_labelled(path)
    blocks = [block.partition("\n") for block in ("\n" + text).split("\n>")[1:]]
    headers = [
        " ".join("".join(c if c.isprintable() else " " for c in header).split(None, 1)) for header, _, _ in blocks
    ]
    told = [
        (plain(sequence), header.strip().rpartition("|")[2].strip())
        for header, (_, _, sequence) in zip(headers, blocks, strict=True)
    ]
    found = [(decode(t), records.classes[k]) for t, k in zip(records.tokens, records.labels, strict=True)]
    assert found == told


def read_folders(path, data):
    """Of the Genomic Benchmarks: a file per sequence in a folder per class; one file is damaged."""
    folder = path.with_suffix("")
    for place in ("train/a/1.txt", "train/a/2.txt", "train/b/10.txt"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text("ACGT\n")
    (folder / "train/a/2.txt").write_bytes(data)
    records = load_labelled(folder, split="train")
    if not data.startswith(b">"):
        assert records.names == ["a/1", "a/2", "b/10"]
        assert decode(records.tokens[1]) == plain(data.decode())
        assert records.labels.tolist() == [0, 0, 1]
    else:
        read_fasta(path, data)
        names = [record.name for record in FastaReader(path)]
        assert records.names == ["a/1", *(f"a/{name}" for name in names), "b/10"]


# What must not be refused


def faultless_intervals(data, line):
    """Whether each line of ASCII is an interval, or none by rights."""
    lines = data_lines(data)
    return (
        data.isascii()
        and b"\0" not in data
        and all(not text or text.startswith("#") or line.fullmatch(text) for text in lines)
    )


def bed_lines(data):
    numbers = BED.findall("\n".join(data_lines(data)))
    return faultless_intervals(data, BED) and all(int(start) <= int(end) for start, end in numbers)


def gff_lines(data):
    numbers = GFF.findall("\n".join(data_lines(data)))
    return faultless_intervals(data, GFF) and all(0 < int(start) <= int(end) for start, end in numbers)


def vcf_header(data):
    return data.startswith(b"##fileformat") and b"\0" not in data


def table_rows(data):
    """Whether this is a table without quotes, each row of which has a sequence and a label."""
    if not data.isascii() or b'"' in data or not data.replace(b"\r\n", b"").replace(b"\n", b"").decode().isprintable():
        return False
    text = [line for line in data_lines(data) if line]
    rows = [line.split("\t" if "\t" in text[0] else ",") for line in text]
    if not rows or len({len(row) for row in rows}) > 1 or len(rows) < 2 or len(set(rows[0])) < len(rows[0]):
        return False
    columns = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    if "sequence" not in columns or "label" not in columns or "split" in columns:
        return False
    return all(re.search("[ACGT]", plain(s) or "") for s in columns["sequence"]) and all(
        label.strip() for label in columns["label"]
    )


BED = re.compile(r"(?m)^chr[12]\t(\d{1,18})\t(\d{1,18})(?:\tn\d(?:\t0\t[+.-])?)?$", re.ASCII)
GFF = re.compile(r"(?m)^chr[12]\tx\t\w+\t(\d{1,18})\t(\d{1,18})\t\.\t[+.-]\t\.\t[\w=;\" ]*$", re.ASCII)
FAULTLESS = {
    "bed": bed_lines, "gff": gff_lines, "gtf": gff_lines, "vcf": vcf_header, "csv": table_rows, "gue": table_rows
}  # fmt: skip
LETTERS = "ACGTNacgtRY"
FORMATS = {
    "fasta": (fasta, LETTERS + ">>\n\n \t;5é", ".fa", read_fasta),
    "bed": (bed, "chr12+-.\t\t\n0123456789# _", ".bed", read_bed),
    "gff": (gff, "chr12+-.?\t\t\n0123456789#=;%3", ".gff3", read_gff),
    "gtf": (lambda rng: gff(rng, gtf=True), 'chr12+-.\t\t\n0123456789#"; ', ".gtf", read_gff),
    "region": (region, "chrMT12:,-03 \n", ".region", read_region),
    "vcf": (vcf, "ACGTNacgt\t\t\n,;=0123456789<>*.[]#chr", ".vcf", read_vcf),
    "csv": (table, LETTERS + ',,\n\n01"\r ', ".csv", read_table),
    "tsv": (lambda rng: table(rng, "\t"), LETTERS + '\t\t\n\n01"\r ', ".tsv", read_table),
    "gue": (table, LETTERS + ',,\n\n01"\r ', ".gue", read_gue),
    "nt": (nt, LETTERS + ">>||\n\n01 ", ".fa", read_nt),
    "genomic-benchmarks": (lambda rng: bases(rng, 1, 80) + "\n", LETTERS + "> \n\t5", ".txt", read_folders),
}  # fmt: skip


@contextlib.contextmanager
def workplace():
    """A folder with the genome that intervals and variants are about."""
    global FASTA, PYSAM, GENOMES, NAMES
    pysam.set_verbosity(0)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        genome = Path(name) / "genome.fa"
        genome.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in GENOME.items()))
        FASTA, PYSAM, GENOMES = IndexedFasta(genome), pysam.FastaFile(str(genome)), read_genome([genome])
        NAMES = names_of(GENOMES)
        yield Path(name)


def one(rng, kind, folder):
    """Damages a file and looks at what becomes of it: 'read', or 'told' where an InputError has said it all."""
    make, alphabet, suffix, check = FORMATS[kind]
    data = given = damaged(rng, make(rng), alphabet)
    intact = True
    if kind not in ("region", "gue", "genomic-benchmarks") and rng.random() < 0.1:
        given = gzip.compress(data, 1, mtime=0)
        if not (intact := rng.random() < 0.5):
            at = rng.randrange(2, len(given))  # it is still known as gzip
            given = given[:at] + (b"" if rng.random() < 0.5 else bytes([given[at] ^ 255]) + given[at + 1 :])
    path = folder / f"m{suffix}"
    path.write_bytes(given)
    try:
        said = told(check, path, data)
        assert "\n" not in said
        assert not (said and intact and kind in FAULTLESS and FAULTLESS[kind](data)), said
        assert " ".join(said.split()).isprintable(), repr(said)  # as the command line shows it
        assert len(said) < 1000, said
    except Exception as error:
        error.add_note(f"{kind}: {given!r}")
        raise
    finally:
        for left in folder.glob("m*.fai"):
            left.unlink()
    return "told" if said else "read"


def told(check, path, data):
    """What an InputError says; nothing if there is none."""
    try:
        check(path, data)
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def place():
    with workplace() as folder:
        yield folder


@pytest.mark.parametrize("kind", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=True))
def test_a_damaged_file_gives_what_is_in_it_or_one_clear_line(place, kind, rng):
    one(rng, kind, place)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--format", choices=FORMATS, action="append", help="may be given several times; otherwise all")
    parser.add_argument("--number", type=int, default=1000, help="files of each format")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with workplace() as folder:
        for kind in options.format or FORMATS:
            counts, start = Counter(), time.time()
            for number in range(options.number):
                try:
                    counts[one(random.Random(f"{options.seed} {number}"), kind, folder)] += 1
                except Exception as error:
                    error.add_note(f"number {number}")
                    raise
            print(f"{kind}: {options.number} files, {counts['read']} read as plain reading has them, {counts['told']} "
                  f"told in one line, {time.time() - start:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
