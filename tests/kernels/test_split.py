"""Gradients that are written side by side are those of a plain split."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from seqmodels.config import Mamba2Config, MambaConfig
from seqmodels.kernels import causal_conv1d as conv_file
from seqmodels.kernels import rms_norm as norm_file
from seqmodels.kernels import ssd as ssd_file
from seqmodels.kernels.causal_conv1d import causal_conv1d
from seqmodels.kernels.rms_norm import rms_norm
from seqmodels.kernels.split import room, split
from seqmodels.mixers import build_mixer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["plain", "triton"])
def forms(request, monkeypatch):
    """The ops as on a CPU, or (in Triton's interpreter) as on a GPU."""
    if request.param == "triton":
        if torch.cuda.is_available():
            pytest.skip("the interpreter is off")
        for file in (conv_file, norm_file):
            form = importlib.import_module(f"{file.__name__}_triton")
            monkeypatch.setattr(file, "triton_form", lambda *_, form=form: form)
        form = importlib.import_module("seqmodels.kernels.ssd_triton")
        monkeypatch.setattr(ssd_file, "_gpu_form", lambda *_: form)
    return request.param


def gradients(parts_of, x, use):
    x = x.clone().requires_grad_()
    use(parts_of(2 * x, (8,), (16,), (4,))).backward()
    return x.grad


USES = {
    "by ops": lambda z, u, w: (rms_norm(causal_conv1d(u, WEIGHT)[0][..., :8], SCALE, z=z) * w[..., :1]).sum(),
    "twice by one kind of op": lambda z, u, w: (causal_conv1d(u, WEIGHT)[0] * causal_conv1d(u, WEIGHT**2)[0]).sum(),
    "by an op and otherwise": lambda z, u, w: (causal_conv1d(u, WEIGHT)[0] * u.sin()).sum() + z.square().sum(),
    "not at all but one": lambda z, u, w: w.square().sum(),
}
WEIGHT, SCALE = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.linspace(0.5, 1, 8)


@pytest.mark.parametrize("use", USES)
def test_however_the_parts_are_used_the_gradient_is_that_of_a_plain_split(forms, use):
    x = torch.randn(2, 20, 28, generator=torch.Generator().manual_seed(0))
    got = gradients(split, x, lambda parts: USES[use](*parts))
    want = gradients(lambda x, *_: x.split([8, 16, 4], -1), x, lambda parts: USES[use](*parts))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_channels_of_no_part_get_the_gradient_zero(forms):
    x = torch.randn(2, 20, 31, generator=torch.Generator().manual_seed(0))
    got = gradients(split, x, lambda parts: USES["by ops"](*parts))
    want = gradients(split, x[..., :28], lambda parts: USES["by ops"](*parts))
    assert torch.equal(got, F.pad(want, (0, 3)))


def test_an_op_that_can_writes_its_gradient_where_it_belongs_and_a_second_one_does_not():
    part = split(torch.randn(2, 20, 28, requires_grad=True) * 1, (8,), (16,), (4,))[1]
    place = room(part).take()
    assert place.shape == part.shape
    assert place.stride() == part.stride()
    assert room(part).take() is None
    assert room(torch.zeros(3)) is None


def test_a_second_way_back_does_not_write_into_the_first_ones_gradient():
    x = torch.randn(2, 20, 28, requires_grad=True)
    z, u, _ = split(x * 1, (8,), (16,), (4,))
    loss = causal_conv1d(u, WEIGHT)[0].square().sum() + z.sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * loss, x)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * kept)


@pytest.mark.parametrize("config", [MambaConfig(d_state=4), Mamba2Config(head_dim=8, d_state=4)])
def test_a_mixers_gradients_are_those_in_float64(forms, config):
    torch.manual_seed(0)
    mixer, x = build_mixer(config, 16), torch.randn(2, 20, 16)
    found = []
    for dtype in (torch.float32, torch.float64):
        one = mixer.to(dtype)
        if dtype == torch.float64:
            one.double()
        inputs = x.to(dtype).requires_grad_()
        y, state = one(inputs, lengths=torch.tensor([20, 13]))
        loss = F.silu(y[0]).sum() + y[1, :13].square().sum() + state.ssm.square().sum() + state.conv.sum()
        found.append([loss, *torch.autograd.grad(loss, [inputs, *one.parameters()])])
    for got, want in zip(*found, strict=True):
        assert (got.double() - want).norm() <= 1e-5 * want.norm() + 1e-7


def test_of_a_mamba2_layers_gradients_only_that_of_dt_is_copied(forms, monkeypatch):
    if forms == "plain":
        pytest.skip("these forms have places of their own")
    mixer, plain, copied = build_mixer(Mamba2Config(head_dim=8, d_state=4), 16), torch.Tensor.copy_, []
    y, _ = mixer(torch.randn(2, 20, 16, requires_grad=True))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, x: copied.append(tuple(to.shape)) or plain(to, x))
    y.sum().backward()
    assert [shape for shape in copied if shape[:2] == (2, 20)] == [(2, 20, 4)]
