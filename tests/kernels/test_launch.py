"""Launches: which compiled kernel a call gets, and when Triton is asked for it."""

import pytest
import torch

triton = pytest.importorskip("triton")
from seqmodels.kernels.causal_conv1d import causal_conv1d  # noqa: E402
from seqmodels.kernels.launch import Launch, Pieces, planned  # noqa: E402


class Kernel:
    """Stands for a Triton kernel of two pointers, a number and a constant, and notes what it is asked to do."""

    arg_names = ("x_ptr", "y_ptr", "length", "BLOCK")

    def __init__(self):
        self.searched, self.launched = [], []

    def __getitem__(self, grid):
        def search(*arguments, **options):
            self.searched.append((grid, arguments, options))
            return Compiled(self.launched)

        return search


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, launched):
        self.launched = launched

    def run(self, *arguments):
        self.launched.append(arguments)


class Driver:
    """The current device is that of tensors on the CPU, -1."""

    device = -1

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return f"stream of {device}"


@pytest.fixture
def driver():
    triton.runtime.driver.set_active(Driver())
    yield triton.runtime.driver.active
    triton.runtime.driver.set_active(None)


@pytest.fixture
def launch(driver):
    return Launch(Kernel(), (2, 3), 7, BLOCK=64, num_warps=4)


X, Y = torch.zeros(64), torch.ones(64)


def test_the_second_launch_hands_addresses_to_the_kernel_that_the_first_found(launch):
    launch(X, Y)
    assert launch.kernel.searched == [((2, 3, 1), (X, Y, 7), {"BLOCK": 64, "num_warps": 4})]
    launch(Y, X)
    launch(X, Y)
    assert len(launch.kernel.searched) == 1
    assert launch.kernel.launched == [
        (2, 3, 1, "stream of -1", "function", "metadata", None, None, None, *addresses, 7, 64)
        for addresses in ((Y.data_ptr(), X.data_ptr()), (X.data_ptr(), Y.data_ptr()))
    ]


def test_triton_searches_where_an_address_is_no_multiple_of_16(launch):
    launch(X[1:], Y)
    launch(X, Y)
    launch(X, Y[3:])
    assert len(launch.kernel.searched) == 3
    launch(X[4:], Y)
    assert len(launch.kernel.searched) == 3
    assert launch.kernel.launched[-1][-4:] == (X.data_ptr() + 16, Y.data_ptr(), 7, 64)


def test_a_tensor_may_be_missing(launch):
    launch(X, None)
    launch(X, None)
    assert launch.kernel.launched[-1][-4:] == (X.data_ptr(), None, 7, 64)


def test_triton_searches_while_another_device_is_current(launch, driver):
    launch(X, Y)
    driver.device = 1
    launch(X, Y)
    assert len(launch.kernel.searched) == 2
    assert launch.kernel.launched == []


def test_triton_searches_while_a_profiler_listens(launch):
    def listen(metadata):
        pass

    launch(X, Y)
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(listen)
    launch(X, Y)
    hook.remove(listen)
    assert len(launch.kernel.searched) == 2
    launch(X, Y)
    assert len(launch.kernel.searched) == 2


def test_a_plan_is_made_once_for_each_form_of_the_arguments():
    made = []
    plan = planned(lambda *arguments: made.append(arguments) or len(made))
    a = torch.zeros(4, 6)
    assert plan(a, None, 2) == plan(torch.ones(4, 6), None, 2) == 1
    others = [
        (a.bfloat16(), None, 2), (a[:3], None, 2), (a.t().contiguous().t(), None, 2), (a, a, 2), (a, None, 3),
        (a, None, 2**31), (a.to("meta"), None, 2),
    ]  # fmt: skip
    assert [plan(*arguments) for arguments in others] == [2, 3, 4, 5, 6, 7, 8]
    assert len(made) == 8


def test_pieces_are_aligned_and_apart():
    pieces = Pieces(torch.bfloat16, (3, 5), (1,), (65,))(X)
    assert [piece.dtype for piece in pieces] == [torch.bfloat16] * 3
    assert all(piece.data_ptr() % 16 == 0 for piece in pieces)
    assert [piece.numel() for piece in pieces] == [64, 64, 128]
    assert pieces[0].data_ptr() + 128 == pieces[1].data_ptr()


# On a GPU, with the real thing.


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def convolved(x):
    weight = torch.linspace(-1, 1, x.shape[2] * 4, device=x.device).view(-1, 4)
    return causal_conv1d(x, weight, activation="silu")[0]


def normal(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@on_gpu
def test_after_an_aligned_tensor_one_that_is_not_gives_the_same():
    x = normal(1, 300, 64)
    want = [convolved(x) for _ in range(2)][1]
    for shift in (1, 4, 0):
        moved = torch.empty(x.numel() + shift, device="cuda", dtype=x.dtype)[shift:].view(x.shape).copy_(x)
        assert torch.equal(convolved(moved), want)


@on_gpu
def test_after_a_small_stride_one_beyond_2_to_31_gives_the_same():
    x = normal(2, 40, 64)
    want = [convolved(x) for _ in range(2)][1]
    far = torch.empty(2**31 + 4096, device="cuda", dtype=x.dtype).as_strided(x.shape, (2**31 + 65, 64, 1)).copy_(x)
    assert torch.equal(convolved(far), want)
    assert torch.equal(convolved(far), want)


@on_gpu
def test_a_captured_launch_can_be_replayed():
    x, other = normal(1, 300, 64), normal(1, 300, 64)
    want = [convolved(t) for t in (x, other)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = convolved(x)
    for t, right in zip((x.clone(), other), want, strict=True):
        x.copy_(t)
        graph.replay()
        assert torch.equal(y, right)
