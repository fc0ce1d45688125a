"""`longseq dna generate`: new sequences from a model that predicts the next base."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

import seqmodels
from seqmodels.checkpoint import choose_device
from seqmodels.errors import InputError
from seqmodels.files import write_json
from seqmodels.sampling import Sampling, sample
from seqmodels.table import check_same, check_writable, open_part, record_of
from seqmodels.tasks.genomics.inference import Dtype
from seqmodels.tasks.genomics.manifest import Manifest
from seqmodels.tasks.genomics.pieces import ANSWERED, Records
from seqmodels.tasks.genomics.tokens import A, Counts, T, Tokens, decode, encode

_SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".frn", ".gz", ".bgz")
_WIDTH = 80  # letters of a line of FASTA


def generate(
    *,
    prompt: str | None = None,
    model: str | None = None,
    output: Path | None = None,
    bases: int = 1000,
    number: int = 1,
    batch: int | None = None,
    include_prompt: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    dtype: Dtype = "float32",
    resume: bool = False,
    quiet: bool = False,
) -> int:
    """Write new sequences that go on from given ones, base by base, as FASTA.

        longseq dna generate --model runs/yeast/model --prompt ATGGCTAGC --bases 300 --number 10 -o new.fa
        longseq dna generate --model runs/yeast/model --prompt starts.fa.gz --temperature 0.7 > new.fa

    The records are called PROMPT_1, PROMPT_2, ... after the record that they go on from (or prompt_1, ...). After each
    name stand how long the prompt was, and the bits per base that the new sequence has under the model. Only A, C, G
    and T come out. A sequence depends on the seed, the place of its prompt and its own number alone, not on how many
    are made. Beside the output, <output>.json says how it was made, as for dna classify.

    Args:
        prompt: Bases, such as ATGGCT, or a FASTA file of sequences to go on from, plain or compressed; - is standard
            input.
        model: Folder of a model that predicts the next base (dna pretrain), or its id on the Hugging Face hub.
        output: FASTA file to write; without it the sequences go to the screen.
        bases: New bases of each sequence.
        number: How many sequences to make from each prompt.
        batch: How many to make at a time; more are faster, but round differently. By default 1 on a CPU, 256 on a GPU.
        include_prompt: Put the prompt before the new bases.
        temperature: Divides the logits; below 1 is safer, above 1 wilder, 0 takes the most likely base.
        top_k: Draw from the k most likely bases only; 0 means from all.
        top_p: Draw from the most likely bases that together reach this probability; 1 means from all.
        seed: Seed of the random numbers; the same seed gives the same file on the same machine.
        device: auto, cpu, cuda or cuda:<number>.
        dtype: Number format of the weights and activations.
        resume: Go on where the same command was stopped or killed: what it has made is in <output>.part. Settings,
            files and weights must be the same.
        quiet: No progress on a terminal.

    Returns:
        0, or 2 if a record of the prompts could not be read as it should (the reasons are on standard error).
    """
    sampling = Sampling(temperature, top_k, top_p)
    if prompt is None or model is None:
        raise InputError("name a model with --model, and give bases or a FASTA file with --prompt")
    for name, value in (("bases", bases), ("number", number), ("batch", batch)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    if resume and (output is None or prompt == "-"):
        raise InputError("only from and to files can be resumed; name them with --prompt and -o, or leave out --resume")
    if output is not None:
        if str(prompt) != "-" and Path(prompt).exists() and output.resolve() == Path(prompt).resolve():
            raise InputError(f"the output {output} is also the prompt; give another name")
        check_writable(output)
    prompts, problems = read_prompts(prompt)
    network: Any = seqmodels.load(model, device=choose_device(device), dtype=getattr(torch, dtype))
    config = network.config
    if config.head.task != "next_token" or config.tokenizer.get("type") != "dna":
        raise InputError(
            f"model {model} does not predict the next base (head {config.head.task!r}, tokens "
            f"{config.tokenizer.get('type')!r}); give one made by 'longseq dna pretrain'"
        )
    batch = batch if batch is not None else 1 if network.device.type == "cpu" else 256
    barred = [token for token in range(config.vocab_size) if not A <= token <= T]
    settings = {"prompt": prompt, "bases": bases, "number": number, "batch": batch, "include_prompt": include_prompt}
    settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "dtype": dtype}
    settings |= {"device": network.device.type}
    manifest = Manifest(output, model, [Path(prompt)] if Path(prompt).is_file() else [], settings)
    if resume and manifest.is_whole():
        return 0
    batches = [
        (place, range(first, min(first + batch, number)))
        for place, (_, tokens) in enumerate(prompts)
        for first in range(0, number, batch)
        if len(tokens)
    ]
    sizes = [[bases + include_prompt * len(prompts[place][1])] * len(items) for place, items in batches]
    progress = tqdm(total=bases * sum(map(len, sizes)), unit="base", unit_scale=True,
                    disable=quiet or not sys.stderr.isatty())  # fmt: skip
    with progress, _gathering(output, sizes, manifest.made, resume) as (file, done):
        progress.update(bases * sum(map(len, sizes[:done])))
        for place, items in batches[done:]:
            name, tokens = prompts[place]
            ids, seeds = torch.from_numpy(tokens.astype(np.int64))[None], [(seed, place, item) for item in items]
            made, nats = sample(
                network, ids.expand(len(items), -1), bases, seeds=seeds, sampling=sampling, barred=barred,
                progress=progress.update,
            )  # fmt: skip
            for item, row, row_nats in zip(items, made.cpu().numpy(), nats.double().cpu().numpy(), strict=True):
                text = decode(tokens) * include_prompt + decode(row.astype(np.uint8))
                bits = -row_nats.mean() / np.log(2)
                said = f"prompt={len(tokens)} new={bases} bits_per_base={bits:.4f} seed={seed}"
                lines = [text[i : i + _WIDTH] for i in range(0, len(text), _WIDTH)]
                file.write("\n".join([f">{name}_{item + 1} {said}", *lines, ""]))
            file.flush()
        manifest.forget()
    manifest.write({"ok": sum(map(len, sizes))}, problems)
    for line in problems:
        print(f"longseq: {line}", file=sys.stderr)
    return 2 if problems else 0


@contextmanager
def _gathering(
    output: Path | None, sizes: list[list[int]], made: Mapping[str, Any] | None, resume: bool
) -> Iterator[tuple[TextIO, int]]:
    """The file in which records gather until all are there, and how many batches of an interrupted run it has.

    `sizes` are the letters of each record of each batch. Without an output it is standard output. A process that is
    killed leaves the file behind, and so does a person who stops it.
    """
    if output is None:
        yield sys.stdout, 0
        return
    part, descriptor = open_part(output)
    with os.fdopen(descriptor, "r+", encoding="utf-8", newline="") as file:
        kept = False
        try:
            done, end = _whole_batches(part, sizes) if resume else (0, 0)
            kept = resume and done > 0
            if kept:
                check_same(str(part), record_of(part), made or {})
            else:
                write_json(record_of(part), made)
            os.ftruncate(descriptor, end)
            file.seek(end)
            yield file, done
            os.replace(part, output)
            record_of(part).unlink()
        except KeyboardInterrupt:
            if kept := os.fstat(descriptor).st_size > 0:
                print(f"what is made so far is in {part}; --resume goes on from it", file=sys.stderr)
            raise
        except OSError as error:
            raise InputError(
                f"cannot write {output}: {error.strerror or error}; make room or give another place"
            ) from None
        finally:
            if not kept:
                part.unlink(missing_ok=True)
                record_of(part).unlink(missing_ok=True)


def _whole_batches(part: Path, sizes: list[list[int]]) -> tuple[int, int]:
    """How many batches stand in a file whole, and the byte at which they end."""
    end = 0
    with open(part, "rb") as file:
        for done, batch in enumerate(sizes):
            for size in batch:
                header, lines = file.readline(), [file.readline() for _ in range(0, size, _WIDTH)]
                if not header.startswith(b">") or sum(map(len, lines)) != size + len(lines):
                    return done, end
            end = file.tell()
    return len(sizes), end


def read_prompts(prompt: str) -> tuple[list[tuple[str, Tokens]], list[str]]:
    """Names and tokens of what to go on from, bases or the records of a file, and what is wrong with the others."""
    path = Path(prompt)
    if prompt != "-" and not path.is_file() and not path.name.lower().endswith(_SUFFIXES):
        counts = Counts()
        tokens = encode(prompt.encode(), counts)
        if counts.invalid:
            position, character = counts.invalid
            raise InputError(f"the prompt is no file, and {character!r} at position {position} of it is no base")
        if not len(tokens):
            raise InputError("the prompt is empty; give at least one base")
        return [("prompt", tokens)], []
    prompts, problems = list[tuple[str, Tokens]](), list[str]()
    try:
        for piece in Records(prompt).pieces(longest=sys.maxsize):
            row = piece.describe()
            if row["status"] in ANSWERED:
                prompts.append((row["record_id"] or "prompt", piece.tokens))
            else:
                problems.append(f"{prompt}: record {row['record_id']!r} is {row['status']}: {row['note']}")
                prompts.append(("", piece.tokens[:0]))  # the places of the others stay
    except InputError as error:
        problems.append(str(error))
    if not any(len(tokens) for _, tokens in prompts):
        raise InputError("; ".join(problems))
    return prompts, problems
