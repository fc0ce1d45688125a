"""Heads: reading in chunks is reading at once; padding never counts; losses are what they say."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import seqmodels
from seqmodels import heads, presets
from seqmodels.batching import pack
from seqmodels.config import HeadConfig, KmerConfig, ModelConfig
from seqmodels.errors import InputError


def classifier(pool, bidirectional=False, **head):
    backbone = presets.mamba2(16, 2, head_dim=8, d_state=4, bidirectional=bidirectional)
    head = HeadConfig(task="sequence", labels=("a", "b", "c"), pool=pool, **head)
    return seqmodels.build(ModelConfig(vocab_size=11, backbone=backbone, head=head), seed=0).double().eval()


@pytest.mark.parametrize("pool", ["last", "mean", "sqrt", "max"])
@torch.no_grad()
def test_a_sequence_read_in_chunks_gets_the_label_of_one_pass(pool):
    model, ids = classifier(pool), torch.randint(0, 11, (2, 50))
    lengths = torch.tensor([50, 41])
    state = None
    for start, stop in [(0, 13), (13, 40), (40, 50)]:
        state = model.read(ids[:, start:stop], state, lengths=(lengths - start).clamp(0, stop - start))
    torch.testing.assert_close(model.classify(state), model(ids, lengths=lengths), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("pool", ["last", "mean", "sqrt", "max"])
@pytest.mark.parametrize("bidirectional", [False, True])
@torch.no_grad()
def test_padding_and_neighbours_change_no_label(pool, bidirectional):
    model, ids = classifier(pool, bidirectional), torch.randint(0, 11, (3, 30))
    lengths = torch.tensor([30, 1, 17])
    padded = model(ids, lengths=lengths)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length])
        torch.testing.assert_close(padded[row : row + 1], alone, rtol=1e-6, atol=1e-7)


def packed(sequences, rows):
    """The batch in which each row holds the sequences of these numbers end to end."""
    ids, lengths, seq_idx = pack([[sequences[i] for i in row] for row in rows])
    return {"ids": ids, "lengths": lengths, "seq_idx": seq_idx}


SEQUENCES = [torch.randint(0, 11, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 1, 17, 30, 2, 5)]
ROWS = [[2, 1, 0, 4], [3], [5, 4]]
PACKED_BACKBONES = {
    "mamba": presets.mamba(16, 2, d_state=4),
    "mamba2": presets.mamba2(16, 2, head_dim=8, d_state=4, chunk_size=8),
    "bi-mamba": presets.mamba(16, 2, d_state=4, bidirectional=True),
    "bi-mamba2": presets.mamba2(16, 2, head_dim=8, d_state=4, chunk_size=8, bidirectional=True),
    "attention": presets.attention(16, 2, num_heads=2),
    "lstm": presets.lstm(16, 1),
    "cnn": presets.cnn(16, 3, taps=5),
    "k-mers": dataclasses.replace(
        presets.mamba2(16, 1, head_dim=8, d_state=4), kmer=KmerConfig(k=3, alphabet=(2, 3, 5, 7), width=6)
    ),
}


@pytest.mark.parametrize(
    ("backbone", "pool"),
    [*((name, "mean") for name in PACKED_BACKBONES), *(("bi-mamba2", p) for p in ("last", "sqrt", "max"))],
)
@torch.no_grad()
def test_packed_sequences_get_the_labels_of_each_alone(backbone, pool):
    model = seqmodels.build(
        dataclasses.replace(classifier(pool).config, backbone=PACKED_BACKBONES[backbone]), seed=0
    ).double()  # fmt: skip
    model.eval()
    logits = model(**packed(SEQUENCES, ROWS))
    assert logits.shape == (3, 4, 3)
    for row, numbers in enumerate(ROWS):
        for place, i in enumerate(numbers):
            torch.testing.assert_close(logits[row, place], model(SEQUENCES[i][None])[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pool", ["last", "mean", "sqrt", "max"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_sequences_in_rows_of_their_own(pool):
    model, labels = classifier(pool), torch.tensor([2, 0, 1, 1, 2, 0])
    ids, lengths, _ = pack([[SEQUENCES[i]] for row in ROWS for i in row])
    padded = {"ids": ids, "lengths": lengths, "targets": labels[[i for row in ROWS for i in row]]}
    targets = torch.tensor([[1, 0, 2, 2], [1, -100, -100, -100], [0, 2, -100, -100]])
    results = []
    for batch in (padded, packed(SEQUENCES, ROWS) | {"targets": targets}):
        loss, metrics = model.loss(batch)
        assert model.terms(batch) == metrics["count"] == 7
        results.append((loss, metrics["accuracy"], torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-9)


def test_supervised_prefixes_of_packed_sequences_are_refused():
    model = classifier("mean", supervise_every=4).train()
    with pytest.raises(InputError, match="supervised prefixes need a row for each sequence"):
        model.loss(packed(SEQUENCES, ROWS) | {"targets": torch.zeros(3, 4, dtype=torch.long)})


def test_a_bidirectional_classifier_says_that_it_cannot_read_in_chunks():
    with pytest.raises(InputError, match="cannot read in chunks"):
        classifier("mean", bidirectional=True).read(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("pool", ["mean", "sqrt"])
def test_supervised_prefixes_average_the_loss_over_every_length_read(pool):
    model = classifier(pool, supervise_every=8)
    ids, targets = torch.randint(0, 11, (2, 30)), torch.tensor([2, 0])
    lengths = torch.tensor([30, 17])
    prefixes = [(0, n) for n in (8, 16, 24, 30)] + [(1, n) for n in (8, 16, 17)]
    want = [F.cross_entropy(model(ids[row : row + 1, :n]), targets[row : row + 1]) for row, n in prefixes]
    batch = {"ids": ids, "targets": targets, "lengths": lengths}
    loss, _ = model.train().loss(batch)
    torch.testing.assert_close(loss.double(), torch.stack(want).mean(), rtol=1e-5, atol=1e-6)
    loss, _ = model.eval().loss(batch)
    torch.testing.assert_close(loss.double(), (want[3] + want[6]) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["labels", "tokens", "packed"])
@torch.no_grad()
def test_a_batchs_loss_is_the_mean_of_its_parts_weighted_by_their_terms(kind):
    ids, lengths = torch.randint(0, 11, (5, 30)), torch.tensor([30, 17, 3, 8, 9])
    if kind != "tokens":
        model, targets = classifier("sqrt", supervise_every=8).train(), torch.tensor([2, 0, 1, 1, 2])
    else:
        config = dataclasses.replace(classifier("mean").config, head=HeadConfig(task="next_token"))
        model = seqmodels.build(config, seed=0)
        targets = ids.masked_fill(torch.arange(30) >= lengths[:, None], -100)
    whole = {"ids": ids, "targets": targets, "lengths": lengths}
    if kind == "packed":
        model = classifier("sqrt")
        whole = packed(SEQUENCES, ROWS) | {
            "targets": torch.tensor([[1, 0, 2, 2], [1, -100, -100, -100], [0, 2] + 2 * [-100]])
        }
    parts = [{name: tensor[rows] for name, tensor in whole.items()} for rows in (slice(0, 2), slice(2, 5))]
    total = sum(model.terms(part) * model.loss(part)[0] for part in parts)
    assert model.terms(whole) == sum(map(model.terms, parts))
    torch.testing.assert_close(total / model.terms(whole), model.loss(whole)[0])


@torch.no_grad()
def test_a_language_models_loss_counts_real_targets_only():
    config = ModelConfig(vocab_size=11, backbone=presets.mamba(16, 1, d_state=4), head=HeadConfig(task="next_token"))
    model = seqmodels.build(config, seed=0).eval()
    ids = torch.randint(0, 11, (2, 9))
    targets = torch.randint(0, 11, (2, 9))
    targets[1, 5:] = -100
    loss, metrics = model.loss({"ids": ids, "targets": targets})
    logits = model(ids)[0]
    kept = torch.cat([logits[0], logits[1, :5]]), torch.cat([targets[0], targets[1, :5]])
    torch.testing.assert_close(loss, F.cross_entropy(*kept))
    assert metrics["count"] == 14
    torch.testing.assert_close(metrics["bits"] * torch.log(torch.tensor(2.0)), loss)


@torch.no_grad()
def test_a_position_head_labels_every_position_and_streams():
    config = ModelConfig(
        vocab_size=11,
        backbone=presets.mamba2(16, 1, head_dim=8, d_state=4),
        head=HeadConfig(task="position", labels=("intron", "exon")),
    )
    model, ids = seqmodels.build(config, seed=0).double().eval(), torch.randint(0, 11, (2, 20))
    whole, _ = model(ids)
    first, state = model(ids[:, :7])
    second, _ = model(ids[:, 7:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    _, metrics = model.loss({"ids": ids, "targets": whole.argmax(-1)})
    assert metrics["accuracy"] == 1.0


def test_a_classifier_without_labels_is_refused():
    config = dataclasses.replace(classifier("mean").config, head=HeadConfig(task="sequence"))
    with pytest.raises(InputError, match="needs labels"):
        seqmodels.build(config)


def with_logits(task):
    """A model whose head gives 37 logits per position, and a batch of 2 x 50 positions, 20 of which do not count."""
    labels = tuple(map(str, range(37))) if task == "position" else ()
    config = dataclasses.replace(
        classifier("mean").config,
        vocab_size=37,
        head=HeadConfig(task=task, labels=labels, dropout=0.5),
        tie_embeddings=True,
    )
    ids = torch.randint(0, 37, (2, 50))
    targets = torch.randint(0, 37, (2, 50))
    targets[1, 30:] = -100
    return seqmodels.build(config, seed=0), {"ids": ids, "targets": targets}


@pytest.mark.parametrize(("chunk", "skip"), [(1, True), (37 * 7, True), (37 * 7, False), (37 * 99, True)])
@pytest.mark.parametrize("task", ["next_token", "position"])
def test_a_loss_in_chunks_of_positions_is_the_loss_with_its_gradients(task, chunk, skip, monkeypatch):
    model, batch = with_logits(task)
    model.double().skip_ignored = skip
    found = []
    for limit in (10**9, chunk):
        monkeypatch.setattr(heads, "LOGITS", limit)
        torch.manual_seed(0)
        loss, metrics = model.loss(batch)
        found.append((loss, metrics, torch.autograd.grad(3 * loss, list(model.parameters()))))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_chunked_loss_has_the_gradients_of_the_definition_in_float64(bias, weighted, monkeypatch):
    monkeypatch.setattr(heads, "LOGITS", 37 * 7)
    x = torch.randn(50, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(37, dtype=torch.float64, requires_grad=True) if bias else None
    targets = torch.randint(0, 37, (50,)).masked_fill(torch.arange(50) % 5 == 0, -100)
    weights = torch.rand(50, dtype=torch.float64) * (targets >= 0) if weighted else None
    total, right = heads._ChunkedCrossEntropy.apply(x, weight, b, targets, weights)
    logits = F.linear(x, weight, b)
    want = (F.cross_entropy(logits, targets, reduction="none") * (1 if weights is None else weights)).sum()
    inputs = [t for t in (x, weight, b) if t is not None]
    torch.testing.assert_close(total, want, rtol=1e-13, atol=0)
    assert right == (logits.argmax(-1) == targets).sum()
    for got, expected in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("limit", [10**9, 37 * 7])
def test_weights_of_targets_count_as_so_many_targets(limit, monkeypatch):
    monkeypatch.setattr(heads, "LOGITS", limit)
    model, batch = with_logits("next_token")
    model.double()
    weights = torch.randint(0, 3, batch["targets"].shape, generator=torch.Generator().manual_seed(1)).double()
    loss, metrics = model.loss(batch | {"weights": weights})
    parts = []
    for times in (1, 2):  # those that count once, and those that count twice
        some = batch | {"targets": batch["targets"].masked_fill(weights != times, -100)}
        parts.append((times * model.terms(some), model.loss(some)[0]))
    want = sum(n * mean for n, mean in parts) / sum(n for n, _ in parts)
    torch.testing.assert_close(loss, want, rtol=1e-6 if limit < 1e9 else 1e-12, atol=0)
    assert metrics["count"] == sum(n for n, _ in parts) == model.terms(batch | {"weights": weights})


def test_the_chunked_loss_in_bfloat16_is_as_exact_as_the_plain_one(monkeypatch):
    model, batch = with_logits("next_token")
    truth = torch.autograd.grad(model.double().loss(batch)[0], model.lm_head.weight)[0]
    model.float()
    errors = []
    for limit in (10**9, 37 * 7):
        monkeypatch.setattr(heads, "LOGITS", limit)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(batch)[0]
        (gradient,) = torch.autograd.grad(loss, model.lm_head.weight)
        assert gradient.dtype == torch.float32
        errors.append((gradient - truth).norm() / truth.norm())
    assert errors[1] < 1.1 * errors[0] < 0.03


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [result] if isinstance(result, torch.Tensor) else result if isinstance(result, (tuple, list)) else []
        self.size = max([self.size, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return result


@pytest.mark.parametrize("task", ["next_token", "position"])
def test_logits_of_all_positions_never_exist_at_once(task, monkeypatch):
    model, batch = with_logits(task)
    x = torch.randn(2, 50, 16)
    monkeypatch.setattr(heads, "LOGITS", 37 * 20)
    head = model.score if task == "position" else model.lm_head
    with Largest() as largest:
        heads._cross_entropy(x.requires_grad_(), head.weight, head.bias, batch["targets"], None)[0].backward()
    assert largest.size == max(x.numel(), 37 * 20)


def test_positions_without_a_target_need_no_logits(monkeypatch):
    model, batch = with_logits("next_token")
    monkeypatch.setattr(heads, "LOGITS", 37 * 7)
    seen, plain = [], heads._logits_in_chunks
    monkeypatch.setattr(heads, "_logits_in_chunks", lambda x, *rest: seen.append(len(x)) or plain(x, *rest))
    model.loss(batch)
    assert seen == [(batch["targets"] != -100).sum()]
    assert seen[0] < batch["targets"].numel()
    assert model.loss(batch | {"targets": torch.full_like(batch["targets"], -100)})[0] == 0


def targets_for(kind, n=6):
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    values = (values > 0).double() if kind == "multi" else 5 * values + 20
    values[1, 0] = values[2, 1] = values[4] = torch.nan  # of the last, nothing is known
    return values


HEADS = {
    "multi": {"targets": "multi", "class_weights": (2.0, 1.0, 0.5)},
    "regression": {"targets": "regression", "scale": ((20.0, 5.0), (19.0, 4.0), (0.0, 1.0))},
}


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_losses_of_labels_and_numbers_are_means_over_what_is_known(kind):
    model, targets = classifier("mean", **HEADS[kind]), targets_for(kind)
    ids = torch.randint(0, 11, (6, 20), generator=torch.Generator().manual_seed(1))
    loss, metrics = model.loss({"ids": ids, "targets": targets})
    each = []
    for row, wanted in zip(model(ids), targets, strict=True):
        if wanted.isnan().all():
            continue
        terms = []
        for k, (x, y) in enumerate(zip(row.tolist(), wanted.tolist(), strict=True)):
            if y == y and kind == "multi":
                p = 1 / (1 + torch.e**-x)
                weight = HEADS[kind]["class_weights"][k]
                terms.append(-weight * torch.tensor(p).log() if y else -torch.tensor(1 - p).log())
            elif y == y:
                terms.append(torch.tensor((x - y) / HEADS[kind]["scale"][k][1]) ** 2)
        each.append(sum(terms) / len(terms))
    torch.testing.assert_close(loss, torch.stack(each).mean().double(), rtol=1e-6, atol=1e-6)
    assert metrics["count"] == 5
    assert ("accuracy" in metrics) == (kind == "multi")


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_labels_and_numbers_of_packed_and_chunked_sequences_are_those_of_each_alone(kind):
    model, values = classifier("mean", **HEADS[kind]), targets_for(kind)
    batch = packed(SEQUENCES, ROWS)
    targets = torch.full((3, 4, 3), torch.nan, dtype=torch.float64)
    losses = []
    for i, row in enumerate(ROWS):
        for j, number in enumerate(row):
            targets[i, j] = values[number]
            if not values[number].isnan().all():
                losses.append(model.loss({"ids": SEQUENCES[number][None], "targets": values[number][None]})[0])
    batch["targets"] = targets
    assert model.terms(batch) == len(losses)
    torch.testing.assert_close(model.loss(batch)[0], torch.stack(losses).mean(), rtol=1e-9, atol=1e-9)
    ids = SEQUENCES[3][None]
    state = model.read(ids[:, 11:], model.read(ids[:, :11]))
    torch.testing.assert_close(model.classify(state), model(ids), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_class_weights_weigh_each_sequence():
    plain, weighted = classifier("mean"), classifier("mean", class_weights=(3.0, 1.0, 0.25))
    ids, targets = torch.randint(0, 11, (4, 20)), torch.tensor([0, 2, 1, 0])
    each = torch.stack([plain.loss({"ids": ids[i : i + 1], "targets": targets[i : i + 1]})[0] for i in range(4)])
    expected = (each * torch.tensor([3.0, 0.25, 1.0, 3.0])).mean()
    torch.testing.assert_close(weighted.loss({"ids": ids, "targets": targets})[0], expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="2 entries for 3 labels"):
        classifier("mean", class_weights=(1.0, 2.0))
