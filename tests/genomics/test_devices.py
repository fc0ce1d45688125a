"""Records spread over processes: the table of one, whatever the records, and whatever happens to a process."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from seqmodels.tasks.genomics import inference
from seqmodels.tasks.genomics.classify import classify
from seqmodels.tasks.genomics.embed import embed
from seqmodels.tasks.genomics.variants import variants
from seqmodels.workers import LostWorker


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As each process has: with as many threads, the same bytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Many short records, some long ones, bad ones, one much longer than all others, and further files."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("fasta")

    def write(name, lengths):
        with (folder / name).open("w") as file:
            for i, n in enumerate(lengths):
                file.write(f">{name}_{i}\n{''.join(rng.choice(list('ACGT'), n))}\n")
        return folder / name

    lengths = rng.integers(1, 200, 300)
    lengths[[3, 50, 51, 120, 200]] = 5000, 1000, 1500, 0, 3000
    few = write("few.fa", [5, 1200])
    few.write_text(few.read_text() + ">bad\nAC5\n>few.fa_0 again\nACGT\n>bad_and_long\n" + "ACGT" * 400 + "!\n")
    return [write("many.fa", lengths), few, folder / "missing.fa", write("last.fa", [30, 40])]


OPTIONS = {"device": "cpu", "batch_tokens": 400, "chunk": 128}


@pytest.fixture(scope="module")
def folder(make_model):
    return make_model(bidirectional=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, files, folder):
    """The table that one process writes."""
    table = tmp_path_factory.mktemp("one") / "o.tsv"
    assert classify(files, model=folder, output=table, **OPTIONS) == 2
    return table


def torn(table, output, size):
    """What is left of a table of which so many bytes have been written when all is killed."""
    output.with_name(f"{output.name}.part").write_bytes(table.read_bytes()[:size])
    shutil.copy(f"{table}.json", f"{output}.part.json")


def test_two_processes_write_the_table_of_one_also_from_where_it_was_stopped(tmp_path, files, folder, whole, capsys):
    torn(whole, tmp_path / "o.tsv", whole.stat().st_size // 3)  # inside a row
    assert classify(files, model=folder, output=tmp_path / "o.tsv", devices=2, resume=True, **OPTIONS) == 2
    assert (tmp_path / "o.tsv").read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"o.tsv", "o.tsv.json"}
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == ["longseq"] * 3
    assert "1 of 300 records are not ok (1 empty)" in told[0]
    assert "few.fa: 3 of 5 records are not ok (1 duplicate, 2 invalid)" in told[1]
    assert "missing.fa does not exist" in told[2]


@pytest.fixture(scope="module")
def variants_of(files):
    """A reference and a VCF file of it: substitutions, and lines that cannot be scored."""
    rng, lines = np.random.default_rng(1), ["##fileformat=VCFv4.2", "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"]
    text = "".join(rng.choice(list("ACGT"), 500))
    for i, start in enumerate(rng.integers(0, 500, 60)):
        ref = "G" if i == 7 else text[start]
        alt = "<DEL>" if i == 9 else f"{text[start]}AC,{'ACGT'['CGTA'.index(text[start])]}"
        lines.append(f"x\t{start + 1}\t.\t{ref}\t{alt}\t.\t.\t.")
    folder = files[0].parent
    (folder / "x.fasta").write_text(f">x\n{text}\n")
    (folder / "x.vcf").write_text("\n".join(lines) + "\n")
    return folder / "x.vcf", folder / "x.fasta"


def written(command, tmp_path, suffix, devices, *given, **options):
    """What a command writes with so many devices."""
    output = tmp_path / f"{devices}{suffix}"
    assert command(*given, output=output, devices=devices, **options) in (0, 2)
    return output.read_bytes()


def test_two_processes_write_the_features_of_one(tmp_path, files, folder):
    for suffix, pool, those in ((".parquet", "mean", files), (".safetensors", "none", files[1:])):
        options = {**OPTIONS, "pool": pool, "model": folder}
        one, two = (written(embed, tmp_path, suffix, devices, those, **options) for devices in (1, 2))
        assert one == two


def test_two_processes_write_the_scores_of_one(tmp_path, variants_of, folder):
    options = {"model": folder, "context": 32, "batch_tokens": 32 * 4 * 5, "device": "cpu"}
    for suffix in (".tsv", ".vcf"):
        one, two = (written(variants, tmp_path, suffix, devices, *variants_of, **options) for devices in (1, 2))
        assert one == two
    (tmp_path / "2.tsv").unlink()
    torn(tmp_path / "1.tsv", tmp_path / "2.tsv", 1000)
    resumed = written(variants, tmp_path, ".tsv", 2, *variants_of, **options, resume=True)
    assert resumed == (tmp_path / "1.tsv").read_bytes()


def dying_in_process(options, device):
    """A worker that the operating system kills at a long record."""
    facts, answer = inference._in_process(inference.Classifier, options, device)

    def until_long(parts):
        first = next(parts)
        if not isinstance(first, list):
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(iter([first, *parts]))

    return facts, until_long


def test_a_process_that_dies_is_told_in_one_line_and_nothing_is_lost(tmp_path, files, folder, whole, monkeypatch):
    monkeypatch.setattr(inference, "_shared", lambda model, options, _: functools.partial(dying_in_process, options))
    table, said = tmp_path / "o.tsv", r"the process on cpu ended unexpectedly \(signal 9, perhaps for want of memory\)"
    with pytest.raises(LostWorker, match=f"{said}; the rows before it are in .*: go on with --resume") as error:
        classify(files[1:], model=folder, output=table, devices=2, **OPTIONS)
    assert "\n" not in str(error.value)
    assert not table.exists()
    left, rows = (tmp_path / "o.tsv.part").read_bytes(), whole.read_bytes().splitlines(keepends=True)
    assert left == b"".join(rows[:1] + rows[301:302])
    monkeypatch.undo()
    assert classify(files[1:], model=folder, output=table, resume=True, **OPTIONS) == 2
    assert table.read_bytes() == b"".join(rows[:1] + rows[301:])


TORCHRUN = """
import json, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from seqmodels import cli, workers
from seqmodels.tasks.genomics import classify, embed, inference, variants  # what the commands import

def run():
    for words in json.loads(sys.argv[1]):
        workers._ADDRESS = words[1]  # the store is that of one command
        cli.main(words)

if __name__ == "__main__":  # as torchrun starts two processes, but forked, since importing takes seconds
    options = {"start_method": "fork", "run_id": "tests", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    elastic_launch(LaunchConfig(1, 1, 2, **options, max_restarts=0, monitor_interval=0.1), run)()
"""


def test_torchruns_processes_share_records_and_variants(tmp_path, files, variants_of, folder, whole):
    common = ["--model", folder, "--device", "cpu", "--batch-tokens"]
    fasta, (vcf, reference) = list(map(str, files)), map(str, variants_of)
    commands = [
        ["dna", "classify", *fasta, "-o", str(tmp_path / "o.tsv"), *common, "400", "--chunk", "128"],
        ["dna", "embed", *fasta, "-o", str(tmp_path / "o.npz"), *common, "400", "--chunk", "128"],
        ["dna", "variants", vcf, "--reference", reference, "-o", str(tmp_path / "v.tsv"), *common, "640",
         "--context", "32"],
    ]  # fmt: skip
    (tmp_path / "program.py").write_text(TORCHRUN)
    command = [sys.executable, str(tmp_path / "program.py"), json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stderr.count("longseq: ") == 3 + 2 + 1, done.stderr  # the first process alone speaks
    assert (tmp_path / "o.tsv").read_bytes() == whole.read_bytes()
    assert "many.fa: 1 of 300 records are not ok (1 empty)" in done.stderr
    options = {"model": folder, "context": 32, "batch_tokens": 640, "device": "cpu"}
    assert (tmp_path / "v.tsv").read_bytes() == written(variants, tmp_path, ".tsv", 1, *variants_of, **options)
    assert (tmp_path / "o.npz").read_bytes() == written(embed, tmp_path, ".npz", 1, files, model=folder, **OPTIONS)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_write_the_features_and_scores_of_one(tmp_path, files, variants_of, folder):
    options = {"model": folder, "device": "cuda"}
    for command, suffix, given, more in (
        (embed, ".safetensors", (files,), {"batch_tokens": 400, "chunk": 128, "pool": "none"}),
        (embed, ".parquet", (files,), {"batch_tokens": 400, "chunk": 128}),
        (variants, ".tsv", variants_of, {"context": 32, "batch_tokens": 32 * 4 * 5}),
    ):
        one, two = (written(command, tmp_path, suffix, devices, *given, **options, **more) for devices in (1, 2))
        assert one == two


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("more", [{}, {"window": 300, "stride": 100, "strand": "both"}])
def test_two_gpus_write_the_table_of_one(tmp_path, files, folder, more):
    tables = []
    for devices in (1, 2):
        options = {**OPTIONS, **more, "device": "cuda", "devices": devices}
        assert classify(files, model=folder, output=tmp_path / f"{devices}.tsv", **options) == 2
        tables.append((tmp_path / f"{devices}.tsv").read_bytes())
    assert tables[0] == tables[1]
