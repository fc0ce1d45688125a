import itertools
import math

import numpy as np
import pytest
import torch
from Bio import SeqIO

import seqmodels
from seqmodels.config import HeadConfig
from seqmodels.errors import InputError
from seqmodels.sampling import sample
from seqmodels.tasks.genomics.generate import generate
from seqmodels.tasks.genomics.tokens import encode

PROMPT = "ACGTTGCANGGTA"


@pytest.fixture(scope="module")
def causal(make_model):
    return make_model(head=HeadConfig(task="next_token"))


def records(path):
    with open(path) as file:
        return [(record.id, str(record.seq), record.description) for record in SeqIO.parse(file, "fasta")]


def test_an_item_depends_on_seed_prompt_and_number_alone(causal, tmp_path, one_thread):
    options = {"model": causal, "bases": 40, "device": "cpu"}
    for name, number, batch, seed in (
        ("one", 1, None, 3),
        ("many", 3, None, 3),
        ("together", 3, 2, 3),
        ("other", 1, None, 4),
    ):
        generate(prompt=PROMPT, output=tmp_path / name, number=number, batch=batch, seed=seed, **options)
    one, many, together, other = (records(tmp_path / name) for name in ("one", "many", "together", "other"))
    assert [name for name, *_ in many] == [f"prompt_{i}" for i in range(1, 4)]
    assert one[0] == many[0]
    assert [text for _, text, _ in together] == [text for _, text, _ in many]
    assert len({text for _, text, _ in (*many, *other)}) == 4
    assert all(len(text) == 40 and set(text) <= set("ACGT") for _, text, _ in many)


def test_each_record_is_gone_on_from_and_its_bits_are_those_of_the_model(causal, tmp_path, capsys, one_thread):
    (tmp_path / "p.fa").write_text(f">first\nACGT\n>bad\nAC1T\n>second it is\n{PROMPT}\n")
    options = {"model": causal, "bases": 40, "device": "cpu", "include_prompt": True, "number": 2}
    assert generate(prompt=str(tmp_path / "p.fa"), output=tmp_path / "o.fa", **options) == 2
    assert "record 'bad' is invalid" in capsys.readouterr().err
    found = records(tmp_path / "o.fa")
    assert [name for name, *_ in found] == ["first_1", "first_2", "second_1", "second_2"]
    model = seqmodels.load(causal, dtype=torch.float64)
    for name, text, said in found:
        start = len("ACGT" if name.startswith("first") else PROMPT)
        assert text[:start] == ("ACGT" if name.startswith("first") else PROMPT)
        ids = torch.from_numpy(encode(text.encode()).astype(np.int64))[None]
        with torch.inference_mode():
            log_p = model(ids)[0].log_softmax(-1)[0, start - 1 : -1]
        bits = -log_p.gather(1, ids[0, start:, None]).mean() / math.log(2)
        assert f"bits_per_base={float(bits):.4f}"[:-1] in said


def test_without_temperature_the_most_likely_base_comes_next(causal, tmp_path, one_thread):
    generate(prompt=PROMPT, model=causal, output=tmp_path / "o.fa", bases=30, temperature=0.0, device="cpu")
    ((_, text, _),) = records(tmp_path / "o.fa")
    model, tokens = seqmodels.load(causal), encode(PROMPT.encode()).astype(np.int64).tolist()
    for base in text:
        with torch.inference_mode():
            tokens.append(7 + int(model(torch.tensor([tokens]))[0][0, -1, 7:11].argmax()))
        assert "ACGT"[tokens[-1] - 7] == base


def test_without_an_output_fasta_goes_to_the_screen(causal, capsys, one_thread):
    assert generate(prompt="acgu", model=causal, bases=100, device="cpu") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith(">prompt_1 prompt=4 new=100 ")
    assert [len(line) for line in lines] == [80, 20]


def test_what_is_stopped_or_killed_anywhere_goes_on_to_the_same_bytes(
    causal, tmp_path, monkeypatch, capsys, one_thread
):
    (tmp_path / "p.fa").write_text(f">first\nACGT\n>second\n{PROMPT}\n")
    options = {
        "prompt": str(tmp_path / "p.fa"),
        "model": causal,
        "bases": 100,
        "device": "cpu",
        "number": 3,
        "batch": 2,
    }
    generate(output=tmp_path / "whole.fa", **options)
    whole, out, part = (tmp_path / "whole.fa").read_bytes(), tmp_path / "o.fa", tmp_path / "o.fa.part"
    sampled, count = sample, itertools.count()

    def stopped(*words, **more):
        if next(count) == 2:
            raise KeyboardInterrupt
        return sampled(*words, **more)

    monkeypatch.setattr("seqmodels.tasks.genomics.generate.sample", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate(output=out, **options)
    assert "--resume goes on" in capsys.readouterr().err
    first = part.read_bytes()
    assert first
    assert whole.startswith(first)
    assert not out.exists()
    with pytest.raises(InputError, match="seed was 0 and is 1"):
        generate(output=out, resume=True, seed=1, **options)
    for cut in (len(first), len(first) - 1, len(first) - 90, 30, 0):
        part.write_bytes(first[:cut])
        (tmp_path / "o.fa.part.json").write_bytes((tmp_path / "whole.fa.json").read_bytes())
        generate(output=out, resume=True, **options)
        assert out.read_bytes() == whole
        assert not part.exists()
        assert not (tmp_path / "o.fa.part.json").exists()
        generate(output=out, resume=True, **options)
        assert "nothing to resume" in capsys.readouterr().err
        out.unlink()
    with pytest.raises(InputError, match="only from and to files can be resumed"):
        generate(resume=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "give bases or a FASTA file"),
        ({"prompt": "ACGZ"}, "'Z' at position 4 of it is no base"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "missing.fa"}, "missing.fa does not exist"),
        ({"bases": 0}, "bases is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"model": "enterobacteria"}, "does not predict the next base"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_no_file(causal, tmp_path, options, message):
    given = {"prompt": PROMPT, "model": causal, "bases": 5, "device": "cpu", "output": tmp_path / "o.fa", **options}
    with pytest.raises(InputError, match=message):
        generate(**given)
    assert list(tmp_path.iterdir()) == []
