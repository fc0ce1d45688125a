"""Ops cut where states meet: a stretch in the middle of three, whose neighbours are given."""

import pytest
import torch

from seqmodels.kernels import selective_scan as scan_file
from seqmodels.kernels import ssd as ssd_file
from seqmodels.kernels.across import Exchange
from seqmodels.kernels.selective_scan import selective_scan
from seqmodels.kernels.ssd import ssd

OPTIONS = {"dt_softplus": True, "dt_limit": (0.01, 2.0)}
OPS = {"ssd": ssd, "scan": selective_scan}


def make(op, b=2, l=150, heads=4, p=3, n=5, g=2, dtype=torch.float64, slow=1.0):
    """Inputs of an op, a state that enters, and a gradient of the final state; A from 1/10 to 10 times `slow`."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    inner, state = ((heads, p), (b, heads, p, n)) if op == "ssd" else ((heads * p,), (b, heads * p, n))
    A = -slow * 10 ** (2 * torch.rand(state[1:2] if op == "ssd" else state[1:], generator=rng).to(dtype) - 1)
    inputs = {"x": normal(b, l, *inner), "dt": normal(b, l, state[1]), "A": A, "B": normal(b, l, g, n)}
    inputs |= {"C": normal(b, l, g, n), "D": normal(state[1]), "dt_bias": normal(state[1]) - 2}
    if op == "scan":
        inputs["z"] = normal(b, l, *inner)
    return inputs, normal(*state), normal(*state)


def packing(b, l, packed):
    return (torch.arange(l) * 5 // l).expand(b, l) if packed else None


class Neighbours:
    """`gather` of the middle one of three ranks: S leaves the first, G enters the last; keeps what the middle sends."""

    def __init__(self, S, G):
        self.S, self.G, self.sent = S, G, []

    def __call__(self, sent):
        self.sent.append(sent)
        first, last = torch.zeros_like(sent), torch.zeros_like(sent)
        if len(self.sent) == 1:  # end states and decays
            first[: self.S.numel()] = self.S.flatten()
        else:  # gradients of initial and final state
            last[0] = self.G
        return torch.stack([first, sent, last])

    def found(self):
        """End state from zero, decay, and the gradient of the initial state by the output alone."""
        end, decay = self.sent[0].split([self.S.numel(), self.sent[0].numel() - self.S.numel()])
        decay = decay.view(*self.S.shape[:2], -1) if decay.numel() == self.S.numel() else decay.view(*self.S.shape[:2])
        return end.view_as(self.S), decay.view(*decay.shape, *[1] * (self.S.dim() - decay.dim())), self.sent[1][0]


def in_the_middle(op, inputs, S, G, dy, seq_idx):
    """What a rank sends, its output, and the gradients of all inputs."""
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    neighbours = Neighbours(S, G)
    y, _ = OPS[op](**inputs, seq_idx=seq_idx, exchange=Exchange(neighbours, 1), **OPTIONS)
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    return neighbours.found(), (y.detach(), *gradients)


def alone(op, inputs, S, G, dy, seq_idx):
    """The same from the ordinary op: with a state that enters, and the gradient of the final state."""
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    S = S.detach().requires_grad_()
    _, end = OPS[op](**inputs, seq_idx=seq_idx, **OPTIONS)
    y, final = OPS[op](**inputs, initial_state=S, seq_idx=seq_idx, **OPTIONS)
    gradients = torch.autograd.grad((y, final), list(inputs.values()), (dy, G.to(final.dtype)), retain_graph=True)
    (F,) = torch.autograd.grad(y, S, dy)
    return (end.detach(), final.detach() - end.detach(), F), (y.detach(), *gradients)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("slow", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_a_stretch_between_others_is_the_op_from_a_state_to_a_gradient(monkeypatch, op, packed, slow, compiled):
    if not compiled:
        if op == "ssd":
            monkeypatch.setattr(ssd_file, "_ELEMENTS_PER_PASS", {"cpu": 500})
        monkeypatch.setattr(scan_file, "_compiled", lambda: None)
    inputs, S, G = make(op, slow=slow)
    dy, seq_idx = torch.randn_like(inputs["x"]), packing(2, 150, packed)
    (end, decay, F), got = in_the_middle(op, inputs, S, G, dy, seq_idx)
    (want_end, want_carried, want_F), want = alone(op, inputs, S, G, dy, seq_idx)
    for ours, right in zip((end, decay * S, F, *got), (want_end, want_carried, want_F, *want), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("slow", [1e-3, 1.0, 100.0])
@pytest.mark.parametrize("op", OPS)
def test_in_float32_what_a_stretch_sends_errs_no_more_than_twice_the_op_and_a_rounding(op, slow):
    inputs, S, G = make(op, l=3000, slow=slow)
    dy, results = inputs["x"].flip(1, 2), {}
    for dtype in (torch.float64, torch.float32):
        given = {name: t.to(dtype) for name, t in inputs.items()}, *(t.to(dtype) for t in (S, G, dy)), None
        (end, _, F), _ = in_the_middle(op, *given)
        (want, _, right), _ = alone(op, *given)
        results[dtype] = (end, F), (want, right)
    (ours, theirs), (exact, _) = results[torch.float32], results[torch.float64]
    for got, usual, right in zip(ours, theirs, exact, strict=True):
        error, budget = ((t - right).norm() / right.norm() for t in (got, usual))
        assert error <= 2 * (budget + torch.finfo(torch.float32).eps)


def on_triton(monkeypatch, op):
    """Makes an exchanging op take its Triton form on a CPU."""
    form = pytest.importorskip(f"seqmodels.kernels.{'ssd' if op == 'ssd' else 'selective_scan'}_triton")
    monkeypatch.setattr(ssd_file if op == "ssd" else scan_file, "_gpu_form", lambda *_: form)
    if op == "ssd":
        monkeypatch.setattr(form, "_PROGRAMS", 8)  # several tiles to a stretch
    else:
        monkeypatch.setattr(form, "STEPS", 8)  # several segments after few steps
        monkeypatch.setattr(form, "PIECE", 4)
        monkeypatch.setattr(form, "_processors", lambda device: 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.usefixtures("nan_in_fresh_memory")
@pytest.mark.parametrize(
    ("op", "shape", "packed"),
    [
        ("ssd", {"b": 2, "l": 200, "heads": 2, "p": 16, "n": 8}, False),
        ("ssd", {"b": 1, "l": 130, "heads": 2, "p": 80, "g": 1}, True),
        ("scan", {"b": 2, "l": 20, "heads": 2, "g": 1}, False),
        ("scan", {"b": 1, "l": 18, "heads": 2}, True),
        ("scan", {"b": 1, "l": 3, "heads": 2, "g": 1}, False),
    ],
)
def test_triton_kernels_cut_where_states_meet_agree_with_float64(monkeypatch, op, shape, packed):
    inputs, S, G = make(op, **shape)
    dy, seq_idx = torch.randn_like(inputs["x"]), packing(*inputs["x"].shape[:2], packed)
    found, results = in_the_middle(op, inputs, S, G, dy, seq_idx)
    on_triton(monkeypatch, op)
    narrow = {name: t.float() for name, t in inputs.items()}
    got, outputs = in_the_middle(op, narrow, S.float(), G.float(), dy.float(), seq_idx)
    for ours, right in zip((*got, *outputs), (*found, *results), strict=True):
        assert (ours.double() - right).norm() <= 2e-6 * right.norm() + 1e-30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_on_a_gpu_a_stretch_errs_no_more_than_twice_the_op_and_a_rounding(op, dtype, packed):
    inputs, S, G = make(op, l=5000, p=64, n=16, dtype=dtype)
    inputs |= {name: inputs[name].float() for name in ("A", "D", "dt_bias")}
    dy, S, G = torch.randn_like(inputs["x"]), S.float(), G.float()
    results = []
    for what, place in ((in_the_middle, "cuda"), (alone, "cuda"), (alone, torch.float64)):
        given = [{name: t.to(place) for name, t in inputs.items()}, *(t.to(place) for t in (S, G, dy))]
        seq_idx = packing(2, 5000, packed)
        (end, _, F), others = what(op, *given, None if seq_idx is None else seq_idx.to(given[1].device))
        results.append((end, F, *others))
    for i, (got, usual, right) in enumerate(zip(*results, strict=True)):
        error, budget = ((t.cpu().double() - right).norm() / right.norm() for t in (got, usual))
        assert error <= 2 * (budget + torch.finfo(dtype).eps), (i, error, budget)
