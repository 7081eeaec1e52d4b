import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the processes that tests start
import torch  # noqa: E402
from hub_server import Hub  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--parity-dir",
        default=str(Path(__file__).parent / "parity"),
        help="folder with reference values of the official implementations",
    )
    parser.addoption(
        "--nlvr-dir",
        default=os.environ.get("HF_VLP_NLVR_DIR"),
        help="folder of NLVR v1 with its splits dev and test; tests on real images skip without it",
    )
    parser.addoption(
        "--butd-dir",
        default=os.environ.get("HF_VLP_BUTD_DIR"),
        help="folder of genuine bottom-up-attention rows, train2014_obj36.tsv; tests on them skip without it",
    )


@pytest.fixture(scope="session", autouse=True)
def use_the_cores_there_are():
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", max(1, cores))))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def hub():
    """A Hub on this machine, empty at first; tests use repositories of their own."""
    with Hub() as server:
        yield server


@pytest.fixture
def nlvr_dir(request):
    path = request.config.getoption("--nlvr-dir")
    if path is None:
        pytest.skip("give the folder of NLVR v1 with --nlvr-dir or HF_VLP_NLVR_DIR")
    return Path(path)


@pytest.fixture
def butd_dir(request):
    path = request.config.getoption("--butd-dir")
    if path is None:
        pytest.skip("give the folder of genuine region features with --butd-dir or HF_VLP_BUTD_DIR")
    return Path(path)
