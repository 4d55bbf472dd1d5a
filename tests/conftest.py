"""Fixtures that several packages' tests share."""

import os
import shutil
import tempfile

import pytest

# Every Ray that a test starts leaves its session there; short, because of the paths of sockets.
RAY_FOLDER = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # `make test` runs two processes of tests

import torch  # noqa: E402  reads the variable

from tests.object_store import bucket  # noqa: E402, F401  a fixture

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any module imports triton


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same in every run."""
    torch.manual_seed(0)


def pytest_unconfigure():
    shutil.rmtree(RAY_FOLDER, ignore_errors=True)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ray_head():
    """A Ray of four CPUs, whatever the machine has, for the whole test run; its workers run as
    users' do."""
    import ray  # here, because the model's tests do without

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        ray.init(
            "local",  # never another Ray of this machine
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=512 << 20,
        )
    yield
    ray.shutdown()
