"""The commands of docs/operations.md: all are commands that exist; the slow form runs them."""

import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ray_jobs import submit
from ray_jobs.config import load_run_config
from tests.ray_jobs.ray_cluster import free_ports, ray_head_with_dashboard

ROOT = Path(__file__).parents[2]
STORAGE = "/mnt/runs"  # of the cluster commands


def commands():
    blocks = re.findall(
        r"^```sh\n(.*?)^```", (ROOT / "docs" / "operations.md").read_text(), re.M | re.S
    )
    return [line for block in blocks for line in block.splitlines()]


def test_every_command_is_one_that_the_program_takes(monkeypatch):
    monkeypatch.chdir(ROOT)
    checked = 0
    for command in commands():
        words = shlex.split(command)
        for module in ("ray_jobs.pretrain", "ray_jobs.submit"):
            if module not in words:
                continue
            arguments = words[words.index(module) + 1 :]
            if module == "ray_jobs.pretrain":
                in_job = words[0] == "ray"
                load_run_config("pretrain", arguments, {}, "", in_job=in_job)
            else:
                options, rest = submit.parse(arguments)
                if rest:
                    submit.load_job(options.job, rest)
            checked += 1
    assert checked >= 8


def run(command, environment, **options):
    done = subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, timeout=400, **options
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_commands_run_as_they_stand_there(tmp_path):
    """In a copy of the repository, with a Ray head on ports of its own and another mount."""
    place = tmp_path / "repository"
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in tracked:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    mount = tmp_path / "mount"
    mount.mkdir()
    outputs = {}
    with ray_head_with_dashboard() as head:
        local = {k: v for k, v in head.environment.items() if not k.startswith("RAY_")}
        local["PYTHONPATH"] = head.environment["PYTHONPATH"]
        for command in commands():
            if command == "ray start --head":
                continue  # what the fixture does
            here = command.replace(".venv/bin/python", sys.executable).replace(STORAGE, str(mount))
            if "ray_jobs.dashboard" in command:
                (port,) = free_ports(1)
                outputs[command] = look(f"{here} --port {port}", port, local, place)
                continue
            environment = local if command.startswith(".venv") else head.environment
            outputs[command] = run(here, environment, cwd=place)
    output = "\n".join(outputs.values())
    assert "resuming after step 12" in output and "20 steps done" in output
    assert "begins with the weights of" in output and "6 steps done" in output
    assert "<title>next</title>" in output or "<title>night</title>" in output
    assert "SUCCEEDED" in output and "kind: RayJob" in output
    assert (place / "runs" / "night" / "report.html").exists()
    assert (mount / "shared" / "report.html").exists() and (mount / "plain").is_dir()


def look(command, port, environment, place):
    """What the server that the command starts shows at first."""
    words = shlex.split(command)
    server = subprocess.Popen(words, cwd=place, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
                    return answer.read().decode()
            except urllib.error.URLError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        server.kill()
        server.wait()
