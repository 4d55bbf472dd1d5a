"""Fixtures that several packages' tests share."""

import pytest


@pytest.fixture(scope="session")
def ray_head():
    """A Ray of two CPUs on this machine, for the whole test run."""
    import ray  # here, because the model's tests do without

    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=512 << 20
    )
    yield
    ray.shutdown()
