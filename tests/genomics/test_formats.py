"""GenBank, EMBL and FASTQ are read as the records that Biopython wrote into them, whole or in parts."""

import csv
import gzip
import io
import random

import pytest
from Bio import SeqIO, bgzf
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

from seqmodels.cli import main
from seqmodels.errors import InputError
from seqmodels.tasks.genomics.fasta import FastaReader
from seqmodels.tasks.genomics.indexed import IndexedFasta
from seqmodels.tasks.genomics.tokens import decode

KINDS = ("genbank", "embl", "fastq")


def written(kind):
    """Bytes of a file of that kind, and its sequences by name."""
    rng = random.Random(kind)
    records = []
    for i, length in enumerate((130, 1, 700)):
        bases = "".join(rng.choices("ACGTN", k=length))
        record = SeqRecord(Seq(bases), id=f"r{i}.1", name=f"r{i}", description=f"record {i}")
        record.annotations["molecule_type"] = "DNA"
        record.letter_annotations["phred_quality"] = [30] * length
        records.append(record)
    text = io.StringIO()
    SeqIO.write(records, text, kind)
    return text.getvalue().encode(), {record.id: str(record.seq) for record in records}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", ["plain", "gzip", "bgzf"])
def test_records_are_those_that_were_written_whole_and_in_parts(tmp_path, kind, packed):
    data, sequences = written(kind)
    path = tmp_path / ("x" if packed == "plain" else "x.gz")
    if packed == "bgzf":
        with bgzf.open(path, "wb") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data) if packed == "gzip" else data)
    found = {record.name: decode(record.tokens()) for record in FastaReader(path)}
    assert found == sequences
    opened = IndexedFasta(path)
    assert opened.lengths == {name: len(sequence) for name, sequence in sequences.items()}
    assert opened.fetch("r2.1", 123, 456).decode() == sequences["r2.1"][123:456]


@pytest.mark.usefixtures("one_thread")
def test_a_command_reads_them_like_fasta(tmp_path):
    rows = {}
    for kind in ("genbank", "fasta"):
        data, sequences = written("genbank")
        text = "".join(f">{name} {name}\n{sequence}\n" for name, sequence in sequences.items())
        (tmp_path / kind).write_bytes(data if kind == "genbank" else text.encode())
        out = tmp_path / f"{kind}.tsv"
        assert main(["dna", "classify", str(tmp_path / kind), "-o", str(out), "--quiet", "--device", "cpu"]) == 0
        with open(out) as file:
            rows[kind] = [
                (row["record_id"], row["length"], row["prob"]) for row in csv.DictReader(file, delimiter="\t")
            ]
    assert rows["genbank"] == rows["fasta"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_gives_its_first_records_or_one_line_that_says_what_it_is(tmp_path, kind):
    data, sequences = written(kind)
    rng, path, told = random.Random(0), tmp_path / "x", 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(8, len(damaged))
            if rng.random() < 0.3:
                del damaged[at : at + rng.choice([1, 20, len(damaged)])]
                damaged = damaged if len(damaged) > 9 else bytearray(data)
            else:
                damaged[at] = rng.randrange(256)
        path.write_bytes(damaged)
        records, said = [], ""
        try:
            for record in FastaReader(path):
                records.append(record.name)
                record.tokens()
        except InputError as error:
            said = str(error)
        told += bool(said)
        assert "\n" not in said
        assert not said or str(path) in said
        assert len(records) <= len(sequences) + 1
    assert told > 5


def test_a_record_without_its_sequence_is_told(tmp_path):
    header = "LOCUS       X                 10 bp    DNA     linear   UNK 01-JAN-1980\nACCESSION   X\nVERSION     X.1\n"
    (tmp_path / "x.gb").write_text(f"{header}CONTIG      join(Y.1:1..10)\n//\n")
    with pytest.raises(InputError, match="record 1 of GenBank has no sequence in this file"):
        list(FastaReader(tmp_path / "x.gb"))
