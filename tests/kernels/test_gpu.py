"""On a GPU: every op's Triton form within its error budget, deterministic, and right beyond 2^31 elements.

The truth is the same op in float64, whose plain PyTorch form other tests hold to the definition. An output or a
gradient may err twice as much as the plain PyTorch form at the same dtype plus one rounding, and in bfloat16 at a
typical shape no more than the public kernels do (measured on the same sort of data). All errors are relative L2 norms.
"""

import contextlib
import math
import traceback

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqmodels.kernels import dispatch
from seqmodels.kernels.causal_conv1d import causal_conv1d
from seqmodels.kernels.rms_norm import rms_norm
from seqmodels.kernels.selective_scan import selective_scan
from seqmodels.kernels.ssd import ssd

OPS = {"ssd": ssd, "selective_scan": selective_scan, "causal_conv1d": causal_conv1d, "rms_norm": rms_norm}
DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning"),  # of the plain forms, see the fixture
]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan():
    """An element that an op forgets to write is NaN, and NaN is within no budget."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills fresh memory
    yield
    torch.use_deterministic_algorithms(False)


# Arguments: a leaf for every tensor that has a gradient, and the options. Layouts: as the layers hand them on (slices
# of wider rows), contiguous, or with the last dimension strided.


class Maker:
    def __init__(self, b, l, dtype, layout="layer", device=DEVICE, seed=0):
        self.b, self.l, self.dtype, self.layout, self.device = b, l, dtype, layout, device
        self.rng = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape, dtype=None):
        return torch.randn(*shape, generator=self.rng, device=self.device, dtype=dtype or self.dtype)

    def uniform(self, low, high, *shape):
        return torch.rand(*shape, generator=self.rng, device=self.device) * (high - low) + low

    def rows(self, *widths):
        """One (b, l, width) per width, side by side in rows that hold 8 columns more."""
        if self.layout == "layer":
            parts = self.normal(self.b, self.l, sum(widths) + 8).split([*widths, 8], -1)[:-1]
        elif self.layout == "contiguous":
            parts = [self.normal(self.b, self.l, width) for width in widths]
        else:
            parts = [self.normal(self.b, width, self.l).transpose(1, 2) for width in widths]
        return list(parts)

    def dt_bias(self, size):
        """Such that the step size lies log-uniformly between 0.001 and 0.1, as Mamba initialises it."""
        dt = self.uniform(math.log(1e-3), math.log(1e-1), size).exp()
        return dt + torch.log(-torch.expm1(-dt))

    def seq_idx(self):
        """Sequences of 1 to some 300 steps, among them neighbours of length 1."""
        starts = torch.rand(self.b, self.l, generator=self.rng, device=self.device) < 0.01
        starts[:, [self.l // 2, (self.l + 1) // 2, self.l // 3]] = True
        return starts.cumsum(1) * 3


def leaves(arguments):
    return {name: t.detach().requires_grad_() for name, t in arguments.items() if t is not None}


def make_ssd(
    b=1, l=1000, h=8, p=64, g=1, n=64, dtype=torch.bfloat16, layout="layer", packed=False, state=True, gate=False,
    per_channel=False, limited=False, device=DEVICE, seed=0,
):  # fmt: skip
    make = Maker(b, l, dtype, layout, device, seed)
    z, dt = make.rows(h * p, h)
    x, B, C = make.rows(h * p, g * n, g * n)
    arguments = {
        "x": x.unflatten(-1, (h, p)), "dt": dt, "A": -make.uniform(1, 16, h), "B": B.unflatten(-1, (g, n)),
        "C": C.unflatten(-1, (g, n)), "D": make.normal(*((h, p) if per_channel else (h,)), dtype=torch.float32),
        "dt_bias": make.dt_bias(h), "z": z.unflatten(-1, (h, p)) if gate else None,
        "initial_state": make.normal(b, h, p, n, dtype=torch.float32) if state else None,
    }  # fmt: skip
    options = {"dt_softplus": True, "seq_idx": make.seq_idx() if packed else None}
    return leaves(arguments), options | ({"dt_limit": (0.002, 0.1)} if limited else {})


def make_selective_scan(
    b=1, l=1000, e=256, g=1, n=16, dtype=torch.bfloat16, layout="layer", packed=False, state=True, gate=True,
    limited=False, device=DEVICE, seed=0,
):  # fmt: skip
    make = Maker(b, l, dtype, layout, device, seed)
    x, z = make.rows(e, e)
    dt, B, C = make.rows(e, g * n, g * n)
    arguments = {
        "x": x, "dt": dt, "A": -torch.arange(1.0, n + 1, device=device).repeat(e, 1), "B": B.unflatten(-1, (g, n)),
        "C": C.unflatten(-1, (g, n)), "D": make.normal(e, dtype=torch.float32), "dt_bias": make.dt_bias(e),
        "z": z if gate else None, "initial_state": make.normal(b, e, n, dtype=torch.float32) if state else None,
    }  # fmt: skip
    options = {"dt_softplus": True, "seq_idx": make.seq_idx() if packed else None}
    return leaves(arguments), options | ({"dt_limit": (0.002, 0.1)} if limited else {})


def make_causal_conv1d(
    b=1, l=1000, d=640, k=4, dtype=torch.bfloat16, layout="layer", packed=False, state=True, bias=True,
    activation="silu", parameters=torch.float32, device=DEVICE,
):  # fmt: skip
    make = Maker(b, l, dtype, layout, device)
    _, x = make.rows(72, d)
    arguments = {
        "x": x, "weight": make.normal(d, k, dtype=parameters),
        "bias": make.normal(d, dtype=parameters) if bias else None,
        "initial_state": make.normal(b, k - 1, d) if state else None,
    }  # fmt: skip
    return leaves(arguments), {"activation": activation, "seq_idx": make.seq_idx() if packed else None}


def make_rms_norm(
    b=1, l=1000, d=512, dtype=torch.bfloat16, layout="layer", gate=True, residual=None, bias=False,
    parameters=torch.float32, device=DEVICE, **options,
):  # fmt: skip
    make = Maker(b, l, dtype, layout, device)
    x, z = make.rows(d, d)
    arguments = {
        "x": x, "weight": make.normal(d, dtype=parameters), "bias": make.normal(d, dtype=parameters) if bias else None,
        "z": z if gate else None, "residual": None if residual is None else make.normal(b, l, d, dtype=residual),
    }  # fmt: skip
    return leaves(arguments), options


MAKE = {
    "ssd": make_ssd, "selective_scan": make_selective_scan, "causal_conv1d": make_causal_conv1d,
    "rms_norm": make_rms_norm,
}  # fmt: skip


# Errors.


@contextlib.contextmanager
def plain_form():
    """The ops as they are on a machine without Triton."""
    found, dispatch._module = dispatch._module, lambda name: None
    try:
        yield
    finally:
        dispatch._module = found


def outputs_of(op, arguments, options):
    outputs = op(**arguments, **options)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def cotangents(outputs, dtype, strided=False):
    """Gradients of the outputs: normal, exact in dtype."""
    rng = torch.Generator(outputs[0].device).manual_seed(1)
    made = [torch.randn(t.shape, generator=rng, device=t.device).to(dtype) for t in outputs]
    return [t.transpose(-1, -2).contiguous().transpose(-1, -2) if strided else t for t in made]


def results(op, arguments, options, weights=None):
    """{name: tensor} of the outputs and of every argument's gradient."""
    outputs = outputs_of(op, arguments, options)
    weights = cotangents(outputs, outputs[0].dtype) if weights is None else weights
    weights = [w.to(t.dtype) for w, t in zip(weights, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(arguments.values()), weights)
    named = dict(zip(("y", "state"), outputs, strict=False)) | dict(zip(arguments, gradients, strict=True))
    return {f"d{key}" if key in arguments else key: t.detach() for key, t in named.items()}


def relative_error(got: Tensor, want: Tensor) -> float:
    error, size = float((got.double() - want).norm()), float(want.norm())
    return error / size if size else error


def rounding_error(want: Tensor, dtype: torch.dtype) -> float:
    """Of one rounding to dtype: 0.21 epsilon over many elements, at most half an epsilon over few."""
    return torch.finfo(dtype).eps * (0.21 if want.numel() >= 256 else 0.5)


def exact_and_ours(op, arguments, options, strided=False):
    """Results in float64 and at the arguments' dtype, and the gradients of the outputs that both got."""
    with torch.no_grad():
        weights = cotangents(outputs_of(op, arguments, options), arguments["x"].dtype, strided)
    exact = {name: t.detach().double().requires_grad_() for name, t in arguments.items()}
    return results(op, exact, options, weights), results(op, arguments, options, weights), weights


def assert_within_budget(op, arguments, options, strided=False):
    wanted, got, weights = exact_and_ours(op, arguments, options, strided)
    with plain_form():
        same = results(op, arguments, options, weights)
    over = []
    for name, want in wanted.items():
        error, plain = relative_error(got[name], want), relative_error(same[name], want)
        budget = 2 * (plain + rounding_error(want, arguments["x"].dtype))
        if not error <= budget:  # NaN is not
            over.append(f"{name}: {error:.2e} > {budget:.2e} (plain {plain:.2e})")
    assert not over, "; ".join(over)


# What is tested where: every length, size and option stands in some case, not every combination.

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

CASES = {
    "ssd": [
        {"l": 1, "h": 4, "p": 16, "n": 8},
        {"l": 7, "h": 4, "p": 32, "g": 2, "n": 16, "dtype": F32, "b": 3},
        {"l": 63, "h": 3, "g": 3, "n": 32, "dtype": F16, "packed": True},
        {"l": 64, "h": 8, "layout": "contiguous", "state": False},
        {"l": 65, "h": 2, "p": 128, "n": 128, "dtype": F32},
        {"l": 1000, "b": 3, "g": 2, "n": 128, "packed": True},
        {"l": 1000, "h": 4, "n": 256},
        {"l": 1000, "h": 2, "p": 128, "n": 256, "dtype": F32},
        {"l": 1000, "h": 2, "p": 48, "n": 24, "gate": True, "per_channel": True, "limited": True},
        {"l": 1000, "h": 2, "layout": "strided"},
        {"l": 4097, "h": 8, "n": 64},
        {"l": 4097, "h": 8, "n": 128, "dtype": F32, "packed": True},
        {"l": 65537, "h": 8, "n": 64, "dtype": F32},
        {"l": 4097, "h": 6, "p": 32, "g": 3, "n": 16, "dtype": F16, "b": 3, "packed": True},
    ],
    "selective_scan": [
        {"l": 1, "e": 64, "n": 8},
        {"l": 7, "e": 48, "g": 2, "n": 16, "dtype": F32, "b": 3},
        {"l": 63, "e": 96, "n": 32, "dtype": F16, "packed": True},
        {"l": 64, "e": 256, "layout": "contiguous", "state": False},
        {"l": 65, "e": 128, "n": 64, "dtype": F32, "limited": True},
        {"l": 1000, "b": 3, "e": 256, "g": 2, "packed": True},
        {"l": 1000, "e": 64, "n": 128, "gate": False},
        {"l": 1000, "e": 64, "n": 256},
        {"l": 1000, "e": 100, "n": 12, "layout": "strided"},
        {"l": 4097, "e": 512},
        {"l": 4097, "e": 256, "dtype": F32, "packed": True},
        {"l": 4097, "e": 256, "dtype": F16, "b": 3},
    ],
    "causal_conv1d": [
        {"l": 1},
        {"l": 2, "b": 3, "d": 70, "dtype": F32},
        {"l": 7, "k": 2, "dtype": F16, "packed": True, "parameters": F16},
        {"l": 63, "k": 3, "b": 3, "dtype": F32, "packed": True},
        {"l": 64, "d": 2304, "layout": "contiguous", "state": False, "parameters": BF16},
        {"l": 65, "bias": False, "activation": None},
        {"l": 1000, "b": 3, "layout": "strided", "packed": True},
        {"l": 4097, "d": 2304},
        {"l": 4097, "dtype": F32},
        {"l": 4097, "dtype": F16, "activation": None, "packed": True},
    ],
    "rms_norm": [
        {"l": 1, "d": 64},
        {"l": 7, "d": 70, "b": 3, "dtype": F32, "gate": False},
        {"l": 63, "d": 256, "dtype": F16, "gate": False, "residual": F32, "residual_in_fp32": True},
        {"l": 64, "d": 512, "layout": "contiguous", "parameters": BF16},
        {"l": 65, "d": 512, "groups": 8, "norm_before_gate": True, "bias": True},
        {"l": 1000, "d": 768, "b": 3, "groups": 3, "dtype": F16},
        {"l": 1000, "d": 512, "layout": "strided", "residual": BF16},
        {"l": 1000, "d": 2048, "dtype": F32, "residual": F32, "bias": True},
        {"l": 4097, "d": 256, "gate": False, "residual": F32, "residual_in_fp32": True},
        {"l": 4097, "d": 256, "gate": False, "residual": BF16},
        {"l": 4097, "d": 2048},
        {"l": 4097, "d": 512, "dtype": F32, "norm_before_gate": True},
    ],
}  # fmt: skip


def described(value):
    if isinstance(value, dict):
        return ",".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in value.items())
    return None


@pytest.mark.parametrize(("name", "case"), [(n, c) for n, cases in CASES.items() for c in cases], ids=described)
def test_outputs_and_every_gradient_stay_within_the_error_budget(name, case):
    arguments, options = MAKE[name](**case)
    assert_within_budget(OPS[name], arguments, options, strided=case.get("layout") == "strided")


PUBLIC = {  # mamba_ssm 2.3.2 at b=1, l=2048, bfloat16
    "ssd": {"y": 2.1e-3} | dict.fromkeys(("dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias"), 3.3e-3),
    "selective_scan": {
        "y": 1.7e-3, "dx": 3.3e-3, "ddt": 2.9e-3, "dA": 2.1e-3, "dB": 2.6e-3, "dC": 2.6e-3, "dD": 1.3e-3, "dz": 3.3e-3,
        "ddt_bias": 1.2e-3,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "case"),
    [("ssd", {"n": 64}), ("ssd", {"n": 128}), ("ssd", {"h": 32, "n": 128}), ("selective_scan", {"e": 512})],
    ids=described,
)
def test_bfloat16_errors_stay_below_the_public_kernels(name, case):
    """Over four draws: of gradients that are a few numbers one draw says little."""
    errors, sizes = (dict.fromkeys(PUBLIC[name], 0.0) for _ in range(2))
    for seed in range(4):
        arguments, options = MAKE[name](l=2048, state=False, seed=seed, **case)
        wanted, got, _ = exact_and_ours(OPS[name], arguments, options)
        for key in PUBLIC[name]:
            errors[key] += float((got[key].double() - wanted[key]).square().sum())
            sizes[key] += float(wanted[key].square().sum())
    found = {key: math.sqrt(errors[key] / sizes[key]) for key in errors}
    assert {key: error for key, error in found.items() if not error <= PUBLIC[name][key]} == {}, found


PUBLIC_MEMORY = [  # GB above the inputs, of outputs, gradients and workspace, as above but at l=262,144
    ("ssd", {"n": 64}, 1.74), ("ssd", {"n": 128}, 2.07), ("ssd", {"h": 32, "n": 128}, 4.85),
    ("selective_scan", {"e": 256}, 0.73), ("selective_scan", {"e": 512}, 1.40), ("selective_scan", {"e": 1024}, 2.75),
]  # fmt: skip


@pytest.mark.parametrize(("name", "case", "gigabytes"), PUBLIC_MEMORY, ids=described)
def test_forward_and_backward_need_no_more_memory_than_the_public_kernels(name, case, gigabytes):
    arguments, options = MAKE[name](l=262144, layout="contiguous", state=False, **case)
    dy = torch.randn_like(arguments["x"])
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, _ = OPS[name](**arguments, **options)
    y.backward(dy)
    assert (torch.cuda.max_memory_allocated() - before) / 1e9 <= gigabytes


# Ways to call an op.

SMALL = {
    "ssd": {"l": 300, "h": 4, "packed": True},
    "selective_scan": {"l": 300, "packed": True},
    "causal_conv1d": {"l": 300, "packed": True},
    "rms_norm": {"l": 300},
}  # fmt: skip
LONG = {  # many programs along the sequence
    "ssd": {"l": 20000, "h": 4}, "selective_scan": {"l": 20000}, "causal_conv1d": {"l": 20000}, "rms_norm": {"l": 20000}
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_a_gpu_has_the_triton_form(name):
    x = torch.zeros(1, device=DEVICE)
    assert dispatch.triton_form(name, x) is not None
    assert dispatch.triton_form(name, x.double()) is None


@pytest.mark.parametrize("name", OPS)
def test_two_runs_give_the_same_bits(name):
    arguments, options = MAKE[name](**LONG[name])
    first, second = (results(OPS[name], arguments, options) for _ in range(2))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("name", OPS)
def test_a_new_length_compiles_nothing_new(name, monkeypatch):
    triton = pytest.importorskip("triton")

    def run(l):
        arguments, options = MAKE[name](l=l, **({"h": 4} if name == "ssd" else {}))
        results(OPS[name], arguments, options)

    for l in (777, 4096, 40000):
        run(l)
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **kernel: compiled.append(kernel["repr"]))
    for l in (1024, 3001, 16384, 50001):
        run(l)
    assert compiled == []


@pytest.mark.parametrize("name", OPS)
def test_a_summed_output_has_the_gradient_of_ones(name):
    """Autograd then hands the op one number, expanded."""
    arguments, options = MAKE[name](**SMALL[name])
    leaf = list(arguments.values())
    got = torch.autograd.grad(outputs_of(OPS[name], arguments, options)[0].sum(), leaf)
    y = outputs_of(OPS[name], arguments, options)[0]
    want = torch.autograd.grad(y, leaf, torch.ones_like(y, memory_format=torch.contiguous_format))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch.compile's own imports, torch 2.11
@pytest.mark.parametrize("name", OPS)
def test_it_compiles_as_one_graph(name):
    arguments, options = MAKE[name](**SMALL[name])
    compiled = torch.compile(OPS[name], fullgraph=True)
    want, got = results(OPS[name], arguments, options), results(compiled, arguments, options)
    dtype = arguments["x"].dtype
    for key, value in want.items():  # what stands around the op may be rounded at other places
        assert relative_error(got[key], value.double()) <= 2 * rounding_error(value, dtype), key


class Calls(TorchDispatchMode):
    """Records the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "longseq":
            self.found.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck itself causes it
@pytest.mark.parametrize("name", OPS)
def test_its_operators_are_well_formed(name):
    arguments, options = MAKE[name](**SMALL[name])
    with Calls() as calls:
        results(OPS[name], arguments, options)
    assert len(calls.found) == 2  # forward and backward
    for operator, args, kwargs in calls.found:
        differentiable = not operator.name().endswith("backward")
        args = tuple(
            a.detach().requires_grad_(differentiable) if isinstance(a, Tensor) and a.is_floating_point() else a
            for a in args
        )
        checks = torch.library.opcheck(operator, args, kwargs)
        assert set(checks.values()) == {"SUCCESS"}, operator


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPS)
def test_a_second_gpu_computes_the_same_while_the_first_is_current(name):
    arguments, options = MAKE[name](**SMALL[name], device="cuda:0")
    there = {key: t.detach().to("cuda:1").requires_grad_() for key, t in arguments.items()}
    options_there = {key: v.to("cuda:1") if isinstance(v, Tensor) else v for key, v in options.items()}
    want = results(OPS[name], arguments, options)
    weights = [w.to("cuda:1") for w in cotangents(outputs_of(OPS[name], arguments, options), arguments["x"].dtype)]
    got = results(OPS[name], there, options_there, weights)
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(got[key].cpu(), value.cpu()) for key, value in want.items())


# More than 2^31 elements: the same as the same data cut in two, with the state handed on. One test at a time has the
# memory that this takes.

ROW = 4384  # of in_proj's output, at d_model 1024


def huge_ssd(l, contiguous):
    h, p, n = 32, 64, 128
    make = Maker(1, l, BF16)
    x, B, C = make.normal(1, l, h * p + 2 * n).split([h * p, n, n], -1)
    dt = make.normal(1, l, h) if contiguous else make.normal(1, l, ROW)[..., -h:]
    x = x.unflatten(-1, (h, p))
    arguments = {
        "x": x.contiguous() if contiguous else x, "dt": dt, "A": -make.uniform(1, 16, h), "B": B[:, :, None],
        "C": C[:, :, None], "D": make.normal(h, dtype=F32), "dt_bias": make.dt_bias(h),
    }  # fmt: skip
    return arguments, {"dt_softplus": True}


def huge_selective_scan(l):
    e, n = 1024, 16
    make = Maker(1, l, BF16)
    x, z, dt, B, C, _ = make.normal(1, l, ROW).split([e, e, e, n, n, ROW - 3 * e - 2 * n], -1)
    arguments = {
        "x": x, "dt": dt, "A": -torch.arange(1.0, n + 1, device=DEVICE).repeat(e, 1), "B": B[:, :, None],
        "C": C[:, :, None], "D": make.normal(e, dtype=F32), "z": z, "dt_bias": make.dt_bias(e),
    }  # fmt: skip
    return arguments, {"dt_softplus": True}


def huge_causal_conv1d(l):
    make = Maker(1, l, BF16)
    x = make.normal(1, l, ROW)[..., 2048 : 2048 + 2304]
    return {"x": x, "weight": make.normal(2304, 4, dtype=F32), "bias": make.normal(2304, dtype=F32)}, {
        "activation": "silu"
    }


def huge_rms_norm(l):
    make = Maker(1, l, BF16)
    x, weight = make.normal(1, l, 2048), make.normal(2048, dtype=F32)
    return {"x": x, "weight": weight, "z": make.normal(1, l, ROW)[..., :2048]}, {}


HUGE = {
    "ssd, strided": ("ssd", lambda: huge_ssd(2_097_152, False)),
    "ssd, contiguous": ("ssd", lambda: huge_ssd(1_114_112, True)),
    "selective_scan": ("selective_scan", lambda: huge_selective_scan(2_162_688)),
    "causal_conv1d": ("causal_conv1d", lambda: huge_causal_conv1d(2_097_152)),
    "rms_norm": ("rms_norm", lambda: huge_rms_norm(2_097_152)),
}


@pytest.mark.xdist_group("huge")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("which", HUGE)
def test_beyond_2_to_31_elements_it_is_the_same_as_the_same_data_cut_in_two(which):
    if torch.cuda.mem_get_info()[1] < 130e9:
        pytest.skip("needs a GPU of 140 GB")
    torch.cuda.empty_cache()
    try:
        worst, failure = worst_differences_from_halves(*HUGE[which]), None
    except RuntimeError:  # whose traceback would keep the tensors, and fail the next test for want of memory
        worst, failure = {}, traceback.format_exc()
    assert failure is None, failure
    # two results, each as far from the truth as the public kernels' bfloat16 gradients
    assert {key: error for key, error in worst.items() if not error <= 2 * 3.3e-3} == {}


def worst_differences_from_halves(name, make):
    """{output or gradient: largest relative difference in any 65,536 steps}."""
    op, (arguments, options) = OPS[name], make()
    l = arguments["x"].shape[1]
    cut, over_time = l // 2, [key for key, t in arguments.items() if t.dim() > 1 and t.shape[1] == l]
    cotangent = Maker(1, l, BF16, seed=1).normal(*arguments["x"].shape)

    def run(part, dy, state, dstate):
        here = {key: t[:, part] if key in over_time else t for key, t in arguments.items()}
        here |= {} if state is None else {"initial_state": state}
        here = leaves(here)
        outputs = outputs_of(op, here, options)
        weights = [dy] if len(outputs) == 1 else [dy, dstate]
        weights = weights if weights[-1] is not None else [dy, torch.zeros_like(outputs[1])]
        gradients = torch.autograd.grad(outputs, list(here.values()), weights)
        return [t.detach() for t in outputs], dict(zip(here, gradients, strict=True))

    def differences(whole, half, offset):
        for start in range(0, half.shape[1], 65536):  # an error anywhere shows, however long the rest
            part = half[:, start : start + 65536].double()
            yield relative_error(whole[:, offset + start : offset + start + part.shape[1]], part)

    outputs, gradients = run(slice(None), cotangent, None, None)
    state = None
    if len(outputs) == 2:
        with torch.no_grad():
            first = {key: t[:, :cut] if key in over_time else t for key, t in arguments.items()}
            state = outputs_of(op, first, options)[1]
    errors = {key: [] for key in ("y", *over_time)}
    left = {key: t.double() for key, t in gradients.items() if key not in over_time}  # of sums over time
    dstate = None
    for part, offset, initial in ((slice(cut, None), cut, state), (slice(None, cut), 0, None)):
        half_outputs, half = run(part, cotangent[:, part], initial, dstate)
        errors["y"] += differences(outputs[0], half_outputs[0], offset)
        for key in over_time:
            errors[key] += differences(gradients[key], half[key], offset)
        left = {key: t - half[key].double() for key, t in left.items()}
        dstate = half.get("initial_state")
        del half_outputs, half
    worst = {key if key == "y" else f"d{key}": float(torch.tensor(found).max()) for key, found in errors.items()}
    return worst | {f"d{key}": float(t.norm() / gradients[key].double().norm()) for key, t in left.items()}
