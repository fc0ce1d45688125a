import numpy as np
import pytest
from Bio.Seq import Seq
from hypothesis import given
from hypothesis import strategies as st

from seqmodels.tasks.genomics.tokens import VOCABULARY, Counts, decode, encode, pad_right, reverse_complement

BASES = st.text(alphabet="ACGTNacgtnRYSWKMBDHVuU-.*", max_size=200)


def test_the_ids_are_those_of_hyenadna_and_caduceus():
    assert [VOCABULARY[i] for i in encode(b"ACGTN")] == list("ACGTN")
    assert encode(b"ACGTN").tolist() == [7, 8, 9, 10, 11]
    assert VOCABULARY.index("[PAD]") == 4


@given(BASES)
def test_every_code_becomes_the_token_that_the_table_says(sequence):
    said = "".join({"U": "T"}.get(c, c if c in "ACGTN" else "N") for c in sequence.upper())
    assert decode(encode(sequence.encode())) == said


@given(BASES)
def test_counts_are_those_of_the_text(sequence):
    counts = Counts()
    encode(sequence.encode(), counts)
    assert counts.length == len(sequence)
    assert counts.unknown == sum(c.upper() not in "ACGTU" for c in sequence)
    assert counts.ambiguous == sum(c.upper() not in "ACGTUN" for c in sequence)
    assert counts.soft_masked == sum(c.islower() for c in sequence)
    assert counts.invalid is None


@given(BASES, st.sampled_from("5>!@ZEé\0\x07"), st.text(alphabet="ACGT5\n", max_size=20))
def test_the_first_character_that_is_no_base_is_named_with_its_position(before, character, after):
    counts = Counts()
    tokens = encode((before + character + after).encode(), counts)
    assert counts.invalid == (len(before) + 1, character)
    assert len(tokens) == counts.length == len(before)


@given(BASES, st.integers(1, 50))
def test_counting_in_parts_is_counting_the_whole(sequence, size):
    whole, parts = Counts(), Counts()
    tokens = encode(sequence.encode(), whole)
    pieces = [encode(sequence[i : i + size].encode(), parts) for i in range(0, len(sequence), size)]
    assert parts == whole
    assert np.array_equal(np.concatenate([*pieces, tokens[:0]]), tokens)


@given(st.text(alphabet="ACGTN", max_size=200))
def test_the_reverse_complement_is_biopythons(sequence):
    assert decode(reverse_complement(encode(sequence.encode()))) == str(Seq(sequence).reverse_complement())


@given(BASES)
def test_the_reverse_complement_of_the_reverse_complement_is_the_sequence(sequence):
    tokens = encode(sequence.encode())
    assert np.array_equal(reverse_complement(reverse_complement(tokens)), tokens)


@pytest.mark.parametrize("token", range(7))
def test_special_tokens_are_their_own_complement(token):
    assert reverse_complement(np.array([token], dtype=np.uint8)).tolist() == [token]


def test_padding_goes_to_the_right():
    ids, lengths = pad_right([encode(b"AC"), encode(b"GTTA")])
    assert ids.tolist() == [[7, 8, 4, 4], [9, 10, 10, 7]]
    assert lengths.tolist() == [2, 4]
