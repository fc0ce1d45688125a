"""DNA as token ids, one per base, with the ids of HyenaDNA and Caduceus.

Ids: [CLS] 0, [SEP] 1, [BOS] 2, [MASK] 3, [PAD] 4, [RESERVED] 5, [UNK] 6, A 7, C 8, G 9, T 10, N 11; the embedding is
padded to 16 rows, so that checkpoints of both families fit.

What becomes of each byte of a sequence (the one place where this is said):

| byte                                | token | counted as                        |
| ----------------------------------- | ----- | --------------------------------- |
| A C G T                             | same  | length                            |
| U                                   | T     | length                            |
| N                                   | N     | length, unknown                   |
| R Y S W K M B D H V X - . * ?       | N     | length, unknown, ambiguous        |
| a c g t u n r y s w k m b d h v x   | as upper case | the same, and soft-masked |
| space, tab, carriage return, newline | none | nothing: white space is skipped   |
| anything else: other letters, digits, control characters, non-ASCII | none | the record is invalid |
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from seqmodels.caduceus import COMPLEMENT_MAP, TOKENIZER, VOCABULARY  # noqa: F401  # others take them from here

VOCAB_SIZE = 16
MASK, PAD, A, C, G, T, N = 3, 4, 7, 8, 9, 10, 11
SOFT_MASKED = 0x10  # above the four bits of a token: written in lower case

Tokens = NDArray[np.uint8]

WHITE_SPACE = b" \t\r\n"  # which a sequence may have anywhere
_AMBIGUOUS, _INVALID = 0x20, 0x40  # further such flags


def _make_table() -> bytes:
    table = bytearray([_INVALID]) * 256
    for base, token in zip("ACGTUN", (A, C, G, T, T, N), strict=True):
        table[ord(base)] = token
    for code in "RYSWKMBDHVX":
        table[ord(code)] = N | _AMBIGUOUS
    for letter in range(ord("A"), ord("Z") + 1):
        if table[letter] != _INVALID:
            table[letter + 32] = table[letter] | SOFT_MASKED
    for code in "-.*?":
        table[ord(code)] = N | _AMBIGUOUS
    return bytes(table)


_TABLE = _make_table()
_COMPLEMENT = (np.arange(256) & 0xF0 | np.tile(COMPLEMENT_MAP, 16)).astype(np.uint8)  # marks stay with their bases
_LETTERS = np.frombuffer(b"??????" + b"?ACGTN" + b"????", dtype=np.uint8)


@dataclass
class Counts:
    """Statistics of one record, summed up while it is tokenized."""

    length: int = 0
    "Bases, every code of the table included."
    unknown: int = 0
    "Bases whose token is N."
    ambiguous: int = 0
    "Of these, the ones that were not written as N."
    soft_masked: int = 0
    "Bases in lower case."
    invalid: tuple[int, str] | None = field(default=None)
    "Position (from 1) and character of the first byte that is no base, if there is one."


def encode(sequence: bytes, counts: Counts | None = None, keep_case: bool = False) -> Tokens:
    """Tokens (l,) uint8 of the bytes of a sequence; adds to `counts`, and stops before the first invalid byte.

    With `keep_case`, those of lower-case letters have the flag SOFT_MASKED.
    """
    return tokens_of(encode_marked(sequence, Counts() if counts is None else counts), keep_case)


def encode_marked(sequence: bytes, counts: Counts) -> Tokens:
    """The same with all flags, from which `count` counts again, in any part of a sequence."""
    marked = np.frombuffer(sequence.translate(_TABLE, WHITE_SPACE), dtype=np.uint8)
    flags = int(np.bitwise_or.reduce(marked)) if len(marked) else 0
    if flags & _INVALID:
        first = int(np.argmax(marked >= _INVALID))
        character = sequence.translate(None, WHITE_SPACE)[first : first + 4].decode("utf-8", errors="replace")[0]
        if counts.invalid is None:
            counts.invalid = (counts.length + first + 1, character)
        marked = marked[:first]
    count(marked, counts)
    return marked


def count(marked: Tokens, counts: Counts) -> None:
    """Adds marked tokens (l,) to the statistics."""
    flags = int(np.bitwise_or.reduce(marked)) if len(marked) else 0
    counts.length += len(marked)
    counts.unknown += int(np.count_nonzero(tokens_of(marked) == N))
    if flags & _AMBIGUOUS:
        counts.ambiguous += int(np.count_nonzero(marked & _AMBIGUOUS))
    if flags & SOFT_MASKED:
        counts.soft_masked += int(np.count_nonzero(marked & SOFT_MASKED))


def tokens_of(marked: Tokens, keep_case: bool = False) -> Tokens:
    """Marked tokens (l,) without their flags, or with that of lower case alone."""
    return marked & np.uint8(SOFT_MASKED | 0x0F if keep_case else 0x0F)


def decode(tokens: Tokens) -> str:
    """The bases of tokens (l,) as upper-case letters; '?' for tokens that are no base."""
    return _LETTERS[tokens].tobytes().decode("ascii")


def reverse_complement(tokens: Tokens) -> Tokens:
    """Tokens (..., l), also marked ones, of the other strand, read in its own direction."""
    return _COMPLEMENT[tokens[..., ::-1]]


def pad_right(sequences: list[Tokens]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids (b, l) with [PAD] after the shorter sequences, and lengths (b,)."""
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    ids = np.full((len(sequences), lengths.max()), PAD, dtype=np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids, lengths
