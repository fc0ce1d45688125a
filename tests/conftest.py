"""What all tests share. Without a GPU, the Triton kernels run in Triton's interpreter."""

import functools
import http.server
import os
import threading

import pytest
import torch

if not torch.cuda.is_available():  # before triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item):
    if item.get_closest_marker("data") and "LONGSEQ_DATA" not in os.environ:
        pytest.skip("LONGSEQ_DATA does not name the folder of real data")


@pytest.fixture
def nan_in_fresh_memory():
    """An element that an op forgets to write is NaN."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """Models so small only lose by a second thread, on busy cores by a factor of ten."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A folder and the address under which a server of this machine hands out its files."""
    folder = tmp_path_factory.mktemp("served")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()
    http_server.server_close()


def pytest_make_parametrize_id(val, argname):
    """Bytes are named by their argument: gzip holds the time, and processes must name the tests they share alike."""
    return argname if isinstance(val, bytes) else None
