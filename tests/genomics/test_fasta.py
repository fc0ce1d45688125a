import gzip
import io
import tracemalloc
import types

import pytest
from Bio import SeqIO, bgzf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqmodels.errors import InputError
from seqmodels.tasks.genomics import fasta
from seqmodels.tasks.genomics.fasta import FastaReader
from seqmodels.tasks.genomics.tokens import decode

LINES = st.lists(st.text(alphabet="ACGTNacgtn", max_size=70) | st.just(""), max_size=6)
HEADERS = st.text(alphabet="abc|>.=; \t_1é", max_size=12)
RECORDS = st.lists(st.tuples(HEADERS, LINES), min_size=1, max_size=6)


def read(path):
    """Everything a file gives: records as (name, bases), and the message at the end."""
    records, message = [], None
    try:
        for record in FastaReader(path):
            records.append((record.name, decode(record.tokens())))
    except InputError as error:
        message = str(error)
    return records, message


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(RECORDS, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.integers(1, 40))
def test_records_are_those_of_biopython(tmp_path, records, line_end, final_line_end, block):
    text = line_end.join(line for header, lines in records for line in [">" + header, *lines])
    text += line_end if final_line_end else ""
    path = tmp_path / "x.fa"
    path.write_bytes(text.encode())
    expected = list(SeqIO.parse(io.StringIO(text.replace("\r\n", "\n")), "fasta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "BLOCK", block)  # block ends fall everywhere
        found, message = read(path)
    assert message is None
    assert [bases for _, bases in found] == [str(record.seq).upper() for record in expected]
    assert [name for name, _ in found] == [record.id for record in expected]


def test_the_description_is_the_rest_of_the_header(tmp_path):
    (tmp_path / "x.fa").write_text(">a1  the  first\tone \nAC\n>b\nG\n>\nT\n")
    found = [(r.name, r.description, r.number) for r in FastaReader(tmp_path / "x.fa")]
    assert found == [("a1", "the  first one", 1), ("b", "", 2), ("", "", 3)]


TEXT = ">one x\n" + "ACGTTNNacgt\n" * 9000 + ">two\nGGG\n>three\n\n"


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.fa"
    path.write_text(TEXT)
    return path


def test_gzip_bgzf_and_standard_input_give_the_same_records(plain, tmp_path, monkeypatch):
    zipped, blocked = tmp_path / "gzip.fa.gz", tmp_path / "bgzf.fa.gz"
    zipped.write_bytes(gzip.compress(TEXT.encode()))
    with bgzf.open(blocked, "wb") as file:
        file.write(TEXT.encode())
    expected = read(plain)
    assert len(expected[0]) == 3
    assert expected[1] is None
    assert read(zipped) == expected
    assert read(blocked) == expected
    for path in (plain, zipped, blocked):
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
        assert read("-") == expected


def test_what_the_caller_does_not_read_is_skipped_and_counted(plain):
    records = list(FastaReader(plain))
    assert [r.counts.length for r in records] == [99000, 3, 0]
    assert records[0].counts.unknown == 18000


@pytest.mark.parametrize("cut", [5000, -8])
@pytest.mark.parametrize("name", ["gzip", "bgzf"])
def test_a_cut_off_file_gives_its_good_records_and_marks_the_last_one(tmp_path, name, cut):
    path = tmp_path / "x.fa.gz"
    bases = [format(i * 2654435761 % 2**40, "040b").translate({48: "A", 49: "C"}) for i in range(2000)]
    text = "".join(f">r{i}\n{sequence}\n" for i, sequence in enumerate(bases))
    if name == "gzip":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        with bgzf.open(path, "wb") as file:
            file.write(text.encode())
    path.write_bytes(path.read_bytes()[:cut])
    records = []

    def collect():
        for record in FastaReader(path):
            records.append((decode(record.tokens()), record.truncated))

    with pytest.raises(InputError, match="cut off"):
        collect()
    assert len(records) > 100
    assert records[:-1] == [(sequence, False) for sequence in bases[: len(records) - 1]]
    assert records[-1][1]


def test_a_bgzf_file_cut_between_two_blocks_is_noticed(tmp_path):
    path = tmp_path / "x.fa.gz"
    with bgzf.open(path, "wb") as file:
        file.write(TEXT.encode())
    path.write_bytes(path.read_bytes()[:-28])
    assert gzip.decompress(path.read_bytes()) == TEXT.encode()  # gzip alone notices nothing
    assert "cut off" in read(path)[1]


@pytest.mark.parametrize(("line", "invalid"), [(b" \t\r\n", None), (b"\x0b", (1, "\x0b")), (b"\x0c\n", (1, "\x0c"))])
def test_a_sequence_of_white_space_is_empty_and_a_control_character_is_no_white_space(tmp_path, line, invalid):
    (tmp_path / "x.fa").write_bytes(b">a\n" + line)
    (record,) = FastaReader(tmp_path / "x.fa")
    assert not len(record.tokens())
    assert record.counts.invalid == invalid


def test_a_damaged_gzip_is_told(tmp_path):
    data = bytearray(gzip.compress(TEXT.encode()))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "x.fa.gz").write_bytes(data)
    assert "damaged" in read(tmp_path / "x.fa.gz")[1]


@pytest.mark.parametrize(
    ("content", "message", "records"),
    [
        (b"", "is empty", 0),
        (b"\n \n\n", "is empty", 0),
        (gzip.compress(b""), "is empty", 0),
        (b"ACGT\nACGT\n", "no FASTA record", 0),
        (b"some text\n>a\nACGT\n", "text before the first '>' ('some text')", 1),
        (b"\x7fELF\x02\x01\x01\0\0\0\n>a\nAC\n", "binary", 0),
        (gzip.compress(b"\x7fELF\x02\x01\x01\0\0\0"), "binary", 0),
        (b"@read1\nACGT\n+\n>>>\n", "is not whole FASTQ after record 0", 0),
        (b"PK\x03\x04\0\0", "zip archive", 0),
        (b"\xfd7zXZ\0\0", "compressed with xz", 0),
        (b">" + b"a" * 100_000, "header line", 0),
        (b">a\nAC\n>" + b"a" * 100_000, "header line", 1),
    ],
)
def test_what_is_not_fasta_is_told_in_one_line(tmp_path, content, message, records):
    path = tmp_path / "x.fa"
    path.write_bytes(content)
    found, told = read(path)
    assert message in told
    assert str(path) in told
    assert "\n" not in told
    assert len(found) == records


@pytest.mark.parametrize(("name", "message"), [("missing.fa", "does not exist"), ("", "is a folder")])
def test_a_path_that_is_no_file_is_told(tmp_path, name, message):
    assert message in read(tmp_path / name)[1]


def test_memory_does_not_grow_with_the_record(tmp_path):
    path = tmp_path / "x.fa"
    path.write_bytes(b">a\n" + b"ACGTACGTAC\n" * 2_000_000)
    tracemalloc.start()
    for record in FastaReader(path):
        length = sum(len(chunk) for chunk in record.chunks())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == 20_000_000
    assert peak < 4_000_000
