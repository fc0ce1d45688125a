"""Training: parameter groups, schedule, learning, logs, and a resume that repeats the uninterrupted run."""

import copy
import dataclasses
import json
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import seqmodels
from seqmodels import presets
from seqmodels.config import HeadConfig, KmerConfig, Mamba2Config, ModelConfig
from seqmodels.errors import InputError
from seqmodels.heads import LanguageModel
from seqmodels.training import TrainingConfig, _MovingAverage, _tf32, fit, parameter_groups, schedule

pytestmark = pytest.mark.usefixtures("one_thread")

BACKBONE = dataclasses.replace(presets.mamba2(16, 2, head_dim=8, d_state=4), dropout=0.1)
CONFIG = ModelConfig(vocab_size=5, backbone=BACKBONE, head=HeadConfig(task="next_token"))
TRAINING = TrainingConfig(max_steps=12, validate_every=4, learning_rate=1e-2, accumulate=2, device="cpu", ema_decay=0.5)


class Cycles:
    """Sequences 0 1 2 3 4 0 1 ... from a random start: a next-token task that a small model learns.

    Batch `held` is not read while the process lives that started this one.
    """

    def __init__(self, held=None):
        self.held = held

    def train_batch(self, step):
        parent = os.getppid()
        while step == self.held and os.getppid() == parent:
            time.sleep(0.05)
        start = torch.randint(0, 5, (4, 1), generator=torch.Generator().manual_seed(step))
        ids = (start + torch.arange(17)) % 5
        return {"ids": ids[:, :-1], "targets": ids[:, 1:]}

    def validation_batches(self):
        return [self.train_batch(10**6 + i) for i in range(2)]


def test_decay_spares_A_log_D_norms_and_biases():
    model = seqmodels.build(
        ModelConfig(vocab_size=5, backbone=presets.mamba(16, 1), head=HeadConfig(task="next_token"))
    )
    decayed, plain = parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    spared = {names[id(p)].split("layers.0.")[-1] for p in plain["params"]}
    assert spared == {
        "norm.weight", "mixer.A_log", "mixer.D", "mixer.conv1d.bias", "mixer.dt_proj.bias", "backbone.norm_f.weight",
    }  # fmt: skip
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_the_schedule_warms_up_linearly_and_falls_to_zero_as_a_cosine():
    factors = [schedule(step, 110, 10 / 110) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_training_learns_and_leaves_a_checkpoint_a_record_and_logs(tmp_path):
    training = dataclasses.replace(TRAINING, max_steps=60, validate_every=20, ema_decay=0.0)
    folder = fit(CONFIG, Cycles(), training, tmp_path / "run", card="# Cycles")
    model = seqmodels.load(folder)
    batch = Cycles().validation_batches()[0]
    assert model.loss(batch)[1]["bits"] < 0.5 * torch.log2(torch.tensor(5.0))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["training"]["learning_rate"] == 1e-2
    metrics = (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").read_text()
    assert "val_bits" in metrics.splitlines()[0]
    assert any(p.name.startswith("events.out.tfevents") for p in (tmp_path / "run" / "logs").rglob("*"))
    with pytest.raises(InputError, match="a run is already here"):
        fit(CONFIG, Cycles(), training, tmp_path / "run")
    other = dataclasses.replace(training, learning_rate=1e-3, resume=True)
    with pytest.raises(InputError, match="started with other settings"):
        fit(CONFIG, Cycles(), other, tmp_path / "run")


def _held_run(run):
    torch.set_num_threads(1)
    fit(CONFIG, Cycles(held=2 * 7), dataclasses.replace(TRAINING, num_workers=1), run)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_run_resumes_to_the_same_weights_to_the_bit(tmp_path):
    # importing takes seconds; but with a GPU the backward pass keeps threads, which do not survive a fork
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    process = context.Process(target=_held_run, args=(tmp_path / "killed",))
    process.start()
    fit(CONFIG, Cycles(), TRAINING, tmp_path / "whole")
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # somewhere inside the next epoch
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "killed" / "model").exists()
    fit(CONFIG, Cycles(), dataclasses.replace(TRAINING, resume=True), tmp_path / "killed")
    whole, resumed = (
        torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("whole", "killed")
    )
    assert resumed["global_step"] == whole["global_step"] == 12
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], tensor), name
    for a, b in zip(whole["optimizer_states"], resumed["optimizer_states"], strict=True):
        torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    best = [load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "killed")]
    torch.testing.assert_close(best[0], best[1], rtol=0, atol=0)


def test_a_run_is_resumed_from_the_same_checkpoint_only(tmp_path):
    training = dataclasses.replace(TRAINING, max_steps=1, validate_every=1, ema_decay=0.0)
    first = str(fit(CONFIG, Cycles(), training, tmp_path / "first"))
    assert "start_from" not in json.loads((tmp_path / "first" / "run.json").read_text())
    fit(CONFIG, Cycles(), training, tmp_path / "second", start_from=first)
    assert json.loads((tmp_path / "second" / "run.json").read_text())["start_from"] == first
    resumed = dataclasses.replace(training, resume=True)
    for other in (None, str(tmp_path / "second" / "model")):
        with pytest.raises(InputError, match="started with other settings"):
            fit(CONFIG, Cycles(), resumed, tmp_path / "second", start_from=other)
    fit(CONFIG, Cycles(), resumed, tmp_path / "second", start_from=first)


def test_the_last_weights_are_exported_on_request(tmp_path):
    training = dataclasses.replace(TRAINING, max_steps=8, learning_rate=1.0, warmup=0.0, ema_decay=0.0)
    exported = {}
    for keep in ("best", "last"):
        run = tmp_path / keep
        folder = fit(CONFIG, Cycles(), dataclasses.replace(training, keep=keep), run)
        exported[keep] = load_file(folder / "model.safetensors")
        want = torch.load(run / "checkpoints" / f"{keep}.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(tensor, want[f"model.{name}"]) for name, tensor in exported[keep].items())


def test_early_stopping_ends_a_run_that_no_longer_improves(tmp_path):
    training = dataclasses.replace(TRAINING, max_steps=400, patience=2, learning_rate=0.0, ema_decay=0.0)
    fit(CONFIG, Cycles(), training, tmp_path / "run")
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 12


def faulty(monkeypatch, fault):
    """Replaces the loss in training by `fault(model, batch, loss)`."""
    plain = LanguageModel.loss

    def loss(self, batch):
        value, metrics = plain(self, batch)
        return fault(self, batch, value) if self.training else value, metrics

    monkeypatch.setattr(LanguageModel, "loss", loss)


def weights_of(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, "gradient"])
def test_a_loss_that_is_no_number_stops_with_the_step_and_the_last_good_checkpoint(tmp_path, monkeypatch, value):
    fit(CONFIG, Cycles(), TRAINING, tmp_path / "whole")
    calls = iter(range(10**6))

    def fault(model, batch, loss):
        if next(calls) != 2 * 5 + 1:  # the second batch of the sixth step
            return loss
        return (
            loss + (0 * loss.detach() * model.lm_head.weight.sum() * 0).sqrt() if value == "gradient" else loss * value
        )

    with monkeypatch.context() as patch:
        faulty(patch, fault)
        with pytest.raises(InputError, match=r"step 6: the loss is .*last good checkpoint is .*last\.ckpt") as error:
            fit(CONFIG, Cycles(), TRAINING, tmp_path / "run")
    assert "\n" not in str(error.value)
    fit(CONFIG, Cycles(), dataclasses.replace(TRAINING, resume=True), tmp_path / "run")
    torch.testing.assert_close(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"), rtol=0, atol=0)


def test_products_are_rounded_to_tf32_in_training_alone_also_where_it_fails():
    def failing():
        with _tf32():
            found.append(torch.get_float32_matmul_precision())
            raise InputError("full disk")

    found = []
    with pytest.raises(InputError):
        failing()
    assert [*found, torch.get_float32_matmul_precision()] == ["high", "highest"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_after_training_on_a_gpu_float32_means_float32_again(tmp_path):
    fit(CONFIG, Cycles(), dataclasses.replace(TRAINING, device="cuda"), tmp_path)
    x, y = torch.randn(2, 512, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    product = (x.float().cuda() @ y.float().cuda()).cpu()
    assert (product - x @ y).norm() < 1e-6 * (x @ y).norm()  # tf32 errs by 3e-4


class Ragged(Cycles):
    """Rows with fewer and fewer targets, in odd batches fewer still, so that parts and batches weigh differently."""

    def train_batch(self, step):
        batch = super().train_batch(step)
        counts = torch.arange(16) < torch.tensor([[16], [11], [6], [1]]) // (1 + 2 * (step % 2))
        return {"ids": batch["ids"], "targets": batch["targets"].where(counts, -100)}


class Unequal(Cycles):
    """Batches of one to five rows, of 2 to 9 steps, the first of which do not count."""

    def train_batch(self, step):
        rng = torch.Generator().manual_seed(step)
        rows, length, skipped = (int(torch.randint(a, b, (), generator=rng)) for a, b in ((1, 6), (2, 10), (0, 2)))
        ids = (torch.randint(0, 5, (rows, 1), generator=rng) + torch.arange(length + 1)) % 5
        targets = ids[:, 1:].clone()
        targets[:, :skipped] = -100
        return {"ids": ids[:, :-1], "targets": targets}

    def tokens(self, step):
        return Unequal.train_batch(self, step)["ids"].numel()

    def validation_batches(self):
        return [self.train_batch(10**6)]


def gradients_of_steps(monkeypatch, config, data, training, run):
    """Of each step: the weights before it, and the gradient that the optimizer was given (no clipping)."""
    found = []
    plain = torch.optim.AdamW.step

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        found.append(([p.detach().clone() for p in parameters], [p.grad.clone() for p in parameters]))
        return plain(self, closure)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        fit(config, data, training, run)
    return found


STILL = dataclasses.replace(CONFIG, backbone=dataclasses.replace(BACKBONE, dropout=0.0))
UNEQUAL = dataclasses.replace(TRAINING, gradient_clip=0.0, ema_decay=0.0, max_steps=5, validate_every=2)


@pytest.mark.parametrize("how", [{"accumulate": 3}, {"accumulate": 1, "step_tokens": 70}])
def test_a_step_over_unequal_batches_has_the_gradient_of_the_mean_over_all_their_targets(tmp_path, monkeypatch, how):
    data, training = Unequal(), dataclasses.replace(UNEQUAL, **how)
    found = gradients_of_steps(monkeypatch, STILL, data, training, tmp_path / "run")
    model, number = seqmodels.build(STILL), 0
    parameters = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    for weights, gradients in found:
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        batches, read = [], 0
        while (
            len(batches) < 3
            if "step_tokens" not in how
            else not batches or abs(read + data.tokens(number) - 70) <= abs(read - 70)
        ):  # the tokens come closer with one more batch
            batches.append(data.train_batch(number))
            read, number = read + data.tokens(number), number + 1
        total, count = 0, 0
        for batch in batches:
            logits, targets = model(batch["ids"])[0].flatten(0, 1), batch["targets"].flatten()
            total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
            count += int((targets != -100).sum())
        want = torch.autograd.grad(total / count, parameters)
        torch.testing.assert_close(gradients, list(want), rtol=1e-4, atol=1e-6)
    assert len(found) == 5


def test_steps_of_as_many_tokens_are_of_that_many_on_average(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(
        "seqmodels.training._Task._gradients",
        lambda self, numbers, batches: steps.append(numbers) or {"loss": torch.zeros(())},
    )
    training = dataclasses.replace(UNEQUAL, accumulate=1, step_tokens=200, max_steps=60)
    fit(STILL, Unequal(), training, tmp_path / "run")
    assert [number for numbers in steps for number in numbers] == list(range(steps[-1][-1] + 1))
    read = [sum(map(Unequal().tokens, numbers)) for numbers in steps]
    assert sum(read) / len(read) == pytest.approx(200, rel=0.02)
    assert max(abs(n - 200) for n in read) <= 45 / 2  # half of the largest batch


def test_a_run_by_tokens_resumes_to_the_same_weights_to_the_bit(tmp_path):
    class Broken(Unequal):
        def train_batch(self, step):
            if step == 20:
                raise ConnectionError
            return super().train_batch(step)

    training = dataclasses.replace(TRAINING, accumulate=1, step_tokens=70)
    fit(CONFIG, Unequal(), training, tmp_path / "whole")
    with pytest.raises(ConnectionError):
        fit(CONFIG, Broken(), training, tmp_path / "broken")
    assert (tmp_path / "broken" / "checkpoints" / "last.ckpt").exists()
    fit(CONFIG, Unequal(), dataclasses.replace(training, resume=True), tmp_path / "broken")
    torch.testing.assert_close(weights_of(tmp_path / "broken"), weights_of(tmp_path / "whole"), rtol=0, atol=0)


def test_what_makes_a_step_is_said_once_and_only_for_data_that_count_tokens(tmp_path):
    with pytest.raises(InputError, match="only one of them can say"):
        fit(CONFIG, Unequal(), dataclasses.replace(TRAINING, step_tokens=70), tmp_path / "run")
    with pytest.raises(InputError, match="step_tokens needs data that say how many tokens a batch has"):
        fit(CONFIG, Cycles(), dataclasses.replace(TRAINING, step_tokens=70, accumulate=1), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Weights(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.zeros(size)) for size in (3, (2, 2)))

    values = property(lambda self: torch.cat([self.one, self.two.flatten()]).detach().double())


def trains_on(device):
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))


def test_the_moving_average_lies_where_training_will_be_and_only_its_count_on_the_host():
    callback = _MovingAverage(0.7)
    callback.setup(trains_on("meta"), Weights(), "fit")
    average = callback._average_model
    assert {parameter.device.type for parameter in average.parameters()} == {"meta"}
    assert average.n_averaged.device.type == "cpu"


def test_the_moving_average_follows_at_once_then_ever_more_slowly_also_when_resumed():
    drawn, module, callback = (
        torch.randn(40, 7, generator=torch.Generator().manual_seed(0)),
        Weights(),
        _MovingAverage(0.7),
    )
    callback.setup(trains_on("cpu"), module, "fit")
    wanted = drawn[0].double()
    for n, weights in enumerate(drawn):
        with torch.no_grad():
            module.one.copy_(weights[:3])
            module.two.copy_(weights[3:].view(2, 2))
        callback.on_train_batch_end(SimpleNamespace(global_step=n + 1), module, None, None, n)
        decay = min(0.7, (1 + n) / (10 + n)) if n else 0
        wanted = decay * wanted + (1 - decay) * weights.double()
        callback.on_validation_epoch_start(None, module)
        torch.testing.assert_close(module.values, wanted, rtol=1e-5, atol=1e-6)
        callback.on_validation_epoch_end(None, module)
        assert torch.equal(module.values, weights.double())
        if n in (4, 20):
            checkpoint = {"state_dict": module.state_dict()}
            callback.on_save_checkpoint(None, module, checkpoint)
            checkpoint, module, callback = copy.deepcopy(checkpoint), Weights(), _MovingAverage(0.7)
            callback.setup(trains_on("cpu"), module, "fit")
            callback.on_load_checkpoint(None, module, checkpoint)


def test_a_batch_that_does_not_fit_is_read_in_parts_that_make_the_same_step(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(CONFIG, backbone=dataclasses.replace(BACKBONE, dropout=0.0))
    fit(config, Ragged(), TRAINING, tmp_path / "whole")
    rows = []

    def fault(model, batch, loss):
        rows.append(len(batch["ids"]))
        if len(rows) > 3 and rows[-1] > 1:  # memory runs short in the second batch of the second step
            raise torch.OutOfMemoryError
        return loss

    capsys.readouterr()
    faulty(monkeypatch, fault)
    fit(config, Ragged(), TRAINING, tmp_path / "run")
    told = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert told == [f"step 2: out of memory; each batch is read in {n} parts from now on" for n in (2, 4)]
    assert rows == [4, 4, 4, 4, 2] + [1] * (4 * 2 * 11)
    torch.testing.assert_close(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"), rtol=1e-4, atol=1e-5)
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["parts"] == 4  # to resume with


def test_a_single_sequence_that_does_not_fit_is_told_the_length_that_would(tmp_path, monkeypatch):
    lengths = []

    def fault(model, batch, loss):
        lengths.append(batch["ids"].shape[1])
        if lengths[-1] > 100:
            raise torch.OutOfMemoryError
        return loss

    class Long(Cycles):
        def train_batch(self, step):
            ids = torch.arange(1025) % 5
            return {"ids": ids[None, :-1], "targets": ids[None, 1:], "lengths": torch.tensor([1024])}

    def took(work):
        work()
        return 5000 + 30 * lengths[-1]

    faulty(monkeypatch, fault)
    monkeypatch.setattr("seqmodels.training._peak_memory", took)
    monkeypatch.setattr("seqmodels.training._available_memory", lambda: 5000 + 30 * 64 + 30 * 100)
    with pytest.raises(InputError, match=r"a sequence of 1024 tokens does not fit into memory.* 159 tokens would"):
        fit(CONFIG, Long(), TRAINING, tmp_path / "run")
    assert lengths == [1024, 128, 64, 32]


def test_training_with_recomputation_makes_the_same_model(tmp_path):
    config = dataclasses.replace(CONFIG, backbone=dataclasses.replace(BACKBONE, dropout=0.0))
    for name, recompute in (("kept", 0), ("recomputed", 16)):
        fit(config, Cycles(), dataclasses.replace(TRAINING, recompute=recompute), tmp_path / name)
    torch.testing.assert_close(weights_of(tmp_path / "recomputed"), weights_of(tmp_path / "kept"), rtol=1e-4, atol=1e-5)


STREAMS = torch.randint(0, 5, (3, 16 * 24 + 1), generator=torch.Generator().manual_seed(0))


class Streams:
    """Three streams; batch n is steps 16 n to 16 n + 15 of each."""

    def __init__(self, broken=None):
        self.broken = broken

    def train_batch(self, number):
        if number == self.broken:
            raise ConnectionError
        chunk = STREAMS[:, 16 * number : 16 * number + 17]
        return {"ids": chunk[:, :-1], "targets": chunk[:, 1:]}

    def validation_batches(self):
        return [self.train_batch(0)]


@pytest.mark.parametrize("kind", ["flat", "multiscale", "kmers"])
def test_a_carried_state_makes_the_loss_of_chunks_that_of_the_whole_stream(tmp_path, kind, monkeypatch):
    backbone = presets.mamba2(16, 2, head_dim=8, d_state=4)
    if kind == "multiscale":
        backbone = presets.multiscale(
            (16, 24), (1, 1), (5,), outer=Mamba2Config(d_state=4, head_dim=8)
        )  # chunks end inside a group
    elif kind == "kmers":
        backbone = dataclasses.replace(backbone, kmer=KmerConfig(k=3, alphabet=(0, 1, 2, 3), width=4))
    config = dataclasses.replace(CONFIG, backbone=backbone)
    training = dataclasses.replace(TRAINING, learning_rate=0.0, carry_state=True, accumulate=1, ema_decay=0.0)
    losses = []
    whole = LanguageModel.loss_from

    def noted(self, batch, state):
        loss, *rest = whole(self, batch, state)
        losses.extend([loss.detach()] if self.training else [])
        return loss, *rest

    monkeypatch.setattr(LanguageModel, "loss_from", noted)
    model = seqmodels.load(fit(config, Streams(), training, tmp_path / "run"))
    ids = STREAMS[:, : 16 * 12 + 1]
    expected = model.eval().loss({"ids": ids[:, :-1], "targets": ids[:, 1:]})[0]
    assert len(losses) == 12
    torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_are_cut_where_a_state_is_carried_and_a_broken_run_resumes_to_the_bit(tmp_path):
    training = dataclasses.replace(TRAINING, carry_state=True)
    fit(CONFIG, Streams(), training, tmp_path / "whole")
    with pytest.raises(ConnectionError):
        fit(CONFIG, Streams(broken=2 * 6), training, tmp_path / "broken")
    fit(CONFIG, Streams(), dataclasses.replace(training, resume=True), tmp_path / "broken")
    torch.testing.assert_close(weights_of(tmp_path / "broken"), weights_of(tmp_path / "whole"), rtol=0, atol=0)
    fit(CONFIG, Streams(), TRAINING, tmp_path / "forgetful")
    assert not torch.equal(
        weights_of(tmp_path / "forgetful")["model.lm_head.weight"],
        weights_of(tmp_path / "whole")["model.lm_head.weight"],
    )


def test_a_state_that_cannot_be_carried_is_told_before_a_run_is_begun(tmp_path):
    training = dataclasses.replace(TRAINING, carry_state=True)
    labels = dataclasses.replace(CONFIG, head=HeadConfig(task="sequence", labels=("a", "b")))
    with pytest.raises(InputError, match="carry_state is for next-token models, not for task 'sequence'"):
        fit(labels, Streams(), training, tmp_path / "run")
    with pytest.raises(InputError, match="carry_state reads one batch after the other"):
        fit(CONFIG, Streams(), dataclasses.replace(training, devices=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
