"""Who may be killed: all that live below a process, and nobody else."""

import os
import subprocess
import time

from benchmarks.chaos_victims import descendants


def test_descendants_are_the_living_of_all_generations():
    shell = subprocess.Popen(["sh", "-c", "sleep 77.125 & wait"])
    try:
        deadline = time.monotonic() + 60
        while list((found := descendants(shell.pid)).values()) != ["sleep 77.125"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        below = descendants(os.getpid())
        assert below.keys() >= found.keys() | {shell.pid} and os.getpid() not in below
        for pid in found:
            os.kill(pid, 9)
        while shell.pid in descendants(os.getpid()):  # then it waits to be asked how it ended
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        shell.kill()
        shell.wait()
    assert descendants(shell.pid) == {}
