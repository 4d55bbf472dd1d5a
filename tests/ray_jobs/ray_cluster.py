"""A Ray head as `ray start --head` gives it: with a dashboard, a job server and a token."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class RayHead:
    """`environment` is that of a shell on which the commands of the docs run."""

    address: str  # of the dashboard
    environment: Mapping[str, str]


@contextmanager
def ray_head_with_dashboard() -> Iterator[RayHead]:
    """On loopback, on free ports, in a folder of its own: no other Ray of this machine is met."""
    folder = tempfile.mkdtemp(prefix="ray")  # short: a socket's path has at most 107 characters
    port, dashboard, agent, client = free_ports(4)
    tools = Path(sys.executable).parent
    environment = dict(os.environ) | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    for name in ("TRITON_INTERPRET", "RAY_ADDRESS"):
        environment.pop(name, None)
    command = [str(tools / "ray"), "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=200000000"]
    command += ["--disable-usage-stats"]
    head = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", head)
        yield RayHead(environment["RAY_API_SERVER_ADDRESS"], environment)
    finally:
        processes = psutil.Process(head.pid).children(recursive=True)
        for process in [psutil.Process(head.pid), *processes]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    while True:
        assert process.poll() is None, "the head has ended"
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.2)
