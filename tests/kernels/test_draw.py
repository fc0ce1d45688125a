"""One step of sampling: the compiled forms against the definition in float64."""

import pytest
import torch

from seqmodels.kernels import draw as draw_module
from seqmodels.kernels.draw import Draws, draw_step, draw_step_in_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.6},
    {"top_k": 9, "top_p": 0.8, "guidance": 1.5},
    {"guidance": 0.0},
    {"end": 3, "shortest": 2},
    {"end": 3, "shortest": 0, "temperature": 0.5},
]


def kept(rows, copies=1, width=4, device=DEVICE):
    generator = torch.Generator().manual_seed(1)
    fresh = Draws(
        torch.rand(rows, width, dtype=torch.float64, generator=generator), torch.zeros(rows, dtype=torch.int64),
        torch.full((rows, width), -7), torch.zeros(rows, width), torch.full((rows * copies, 1), -7),
        torch.ones(rows, dtype=torch.bool),
    )  # fmt: skip
    return Draws(*(tensor.to(device) for tensor in fresh))


def logits(rows, size, seed, device=DEVICE):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).mul(2).to(device)


def triton_form(*arguments, **options):
    form = pytest.importorskip("seqmodels.kernels.draw_triton")
    form.draw_step(*arguments, *options.values())


@pytest.mark.parametrize("form", ["triton", pytest.param("cpu", marks=pytest.mark.skipif(DEVICE != "cpu", reason=""))])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_form_draws_what_the_definition_draws_and_keeps_the_same(form, options):
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 1.0, "end": -1, "shortest": 0} | options
    copies = 1 if options["guidance"] == 1 else 2
    for rows, size in ((2, 40), (1, 5)):
        barred = torch.zeros(size, dtype=torch.bool, device=DEVICE)
        barred[1] = True
        found, expected = kept(rows, copies), kept(rows, copies)
        for step in range(5):  # once around the buffers of four steps
            given = logits(rows * copies, size, step)
            {"triton": triton_form, "cpu": draw_step}[form](given, barred, found, **options)
            draw_step_in_torch(given, barred, expected, **options)
        for name in Draws._fields:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
        assert found.step.tolist() == [5] * rows


def test_guidance_zero_is_the_untold_model_and_one_the_told_one():
    told, untold = logits(1, 20, 0, "cpu"), logits(1, 20, 1, "cpu")
    barred = torch.zeros(20, dtype=torch.bool)
    for guidance, alone in ((0.0, untold), (1.0, told)):
        guided, plain = kept(1, 2, device="cpu"), kept(1, device="cpu")
        for _ in range(4):
            draw_step_in_torch(torch.cat([told, untold]), barred, guided, 1.0, 0, 1.0, guidance, -1, 0)
            draw_step_in_torch(alone, barred, plain, 1.0, 0, 1.0, 1.0, -1, 0)
        assert torch.equal(guided.tokens, plain.tokens)


def test_a_row_does_not_depend_on_the_others():
    barred = torch.zeros(50, dtype=torch.bool)
    whole, alone = kept(5, device="cpu"), kept(5, device="cpu")
    alone = Draws(*(tensor[2:3].clone() for tensor in alone))
    for step in range(3):
        given = logits(5, 50, step, "cpu")
        draw_step(given, barred, whole, top_p=0.9)
        draw_step(given[2:3], barred, alone, top_p=0.9)
    assert torch.equal(whole.tokens[2:3], alone.tokens)
    assert torch.equal(whole.nats[2:3], alone.nats)


def test_a_barred_token_is_never_drawn_at_the_extreme_quantiles():
    barred = torch.zeros(258, dtype=torch.bool)
    barred[[0, 256, 257]] = True
    for quantile, token in ((0.0, 1), (1 - 2**-53, 255)):
        for form in (draw_step, draw_step_in_torch):
            draws = kept(1, device="cpu")
            draws.uniform.fill_(quantile)
            form(
                torch.zeros(1, 258), barred, draws,
                temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, end=-1, shortest=0,
            )  # fmt: skip
            assert draws.tokens[0, 0] == token


def test_vocabularies_beyond_one_program_take_the_definition(monkeypatch):
    called = []
    monkeypatch.setattr(draw_module, "triton_form", lambda *_: called.append(1))
    draws = kept(1, device="cpu")
    for size in (draw_module.MOST, draw_module.MOST + 1):
        draw_step(torch.zeros(1, size), torch.zeros(size, dtype=torch.bool), draws)
    assert len(called) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.8), (7, 1.0), (7, 0.8)])
@pytest.mark.parametrize("rows", [1, 256])
def test_on_a_gpu_a_captured_step_draws_what_the_definition_draws(rows, top_k, top_p):
    barred = torch.zeros(258, dtype=torch.bool, device="cuda")
    found, expected = kept(rows, device="cuda"), kept(rows, device="cuda")
    given, graph = logits(rows, 258, 0, "cuda").bfloat16(), torch.cuda.CUDAGraph()
    draw_step(given, barred, kept(rows, device="cuda"), top_k=top_k, top_p=top_p)  # compiles
    with torch.cuda.graph(graph):
        draw_step(given, barred, found, top_k=top_k, top_p=top_p)
    for step in range(6):
        given.copy_(logits(rows, 258, step, "cuda"))
        graph.replay()
        draw_step_in_torch(given, barred, expected, 1.0, top_k, top_p, 1.0, -1, 0)
    for name in Draws._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
