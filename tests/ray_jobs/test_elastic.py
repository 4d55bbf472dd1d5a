"""A cluster whose nodes come and go under a run: the workers follow, the bits stay."""

import os
import sys
import time
from contextlib import contextmanager

import pytest
from ray.cluster_utils import Cluster

from arbitor.checkpoint import CHECKPOINTS, load_checkpoint, newest_checkpoint
from arbitor.settings import build, write_yaml
from ray_jobs.config import RunConfig
from ray_jobs.journal import JournalReader
from tests.ray_jobs.started import started

STEPS = 1200
VALUES = {
    "steps": STEPS,
    "log_interval": 100,
    "eval_interval": 0,
    "save_interval": 20,
    "model": {"width": 64, "num_layers": 1},
    "data": {
        "batch_size": 2,
        "sequence_length": 64,
        "slots_per_step": 4,
        "sources": {"text": {"path": "sample://text"}},
    },
}
# The command of a user, but for how soon it looks for new room.
PROGRAM = """
from ray_jobs import run, scaling, text
scaling.RESIZE_INTERVAL_S = 2.0
run.main("text", "", text.DEFAULTS)
"""
NODE = {"num_cpus": 1, "object_store_memory": 256 << 20}


@pytest.fixture
def cluster():
    """A head node with room for one worker."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    yield cluster
    cluster.shutdown()


@contextmanager
def start(cluster, tmp_path, name, num_workers):
    """The command as a process, and its configuration."""
    scaling = {"num_workers": num_workers, "threads_per_worker": 1}
    values = VALUES | {"name": name, "storage": str(tmp_path), "scaling": scaling}
    path = tmp_path / f"{name}.yaml"
    path.write_text(write_yaml(values))
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    environment.pop("TRITON_INTERPRET", None)
    with open(tmp_path / f"{name}.out", "w") as output:
        command = [sys.executable, "-c", PROGRAM, str(path)]
        with started(command, env=environment, stdout=output, stderr=output) as driver:
            yield driver, build(RunConfig, values)


def await_workers(driver, config, num_workers, steps=30):
    """Until so many workers have done some steps that nobody had done before."""
    reader, seen, deadline = JournalReader(config.folder), 0, time.monotonic() + 180
    while seen < steps:
        assert driver.poll() is None, "the run ended"
        assert time.monotonic() < deadline, f"no {num_workers} workers"
        for record in reader.read():
            seen += record.metrics["throughput/workers"] == num_workers
        time.sleep(0.1)


def final_tensors(config):
    manifest, tensors = load_checkpoint(newest_checkpoint(config.folder / CHECKPOINTS))
    assert manifest.step == STEPS
    return tensors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray's own, of the nodes' log files
def test_workers_follow_the_nodes_of_the_cluster_and_the_bits_stay(cluster, tmp_path):
    """1 -> 2 -> 1 workers: a node is added, and later dies."""
    with start(cluster, tmp_path, "elastic", [1, 2]) as (driver, config):
        await_workers(driver, config, 1)
        node = cluster.add_node(**NODE)
        await_workers(driver, config, 2)
        cluster.remove_node(node, allow_graceful=False)
        assert driver.wait(timeout=400) == 0, (tmp_path / "elastic.out").read_text()
    records = list(JournalReader(config.folder).read())
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    workers = [record.metrics["throughput/workers"] for record in records]
    assert workers[0] == workers[-1] == 1 and 2 in workers

    with start(cluster, tmp_path, "alone", 1) as (driver, alone):
        assert driver.wait(timeout=400) == 0, (tmp_path / "alone.out").read_text()
    expected, found = final_tensors(alone), final_tensors(config)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
