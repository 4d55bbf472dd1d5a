"""The processes of a command that may be killed, as Linux shows them."""

import ctypes
import os
import random
import signal
import time
from contextlib import suppress
from typing import NamedTuple

import psutil

PR_SET_CHILD_SUBREAPER = 36
# For processes that end by themselves. Those of Ray's that ask whether init has become their parent
# never learn here that the one they serve is gone: their parent is then this process.
PATIENCE_S = 3.0


# What a process has in its command line, and how often it is chosen; the command itself has none.
KINDS = {
    "worker": ("RayTrainWorker", 0.45),
    "controller": ("TrainController", 0.2),
    "raylet": ("/raylet/raylet", 0.1),
    "driver": ("", 0.25),
}


class Victim(NamedTuple):
    name: str
    pid: int


def adopt_orphans() -> None:
    """From here on a process whose parent was killed becomes a child of this one."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def choose_victim(driver: int, rng: random.Random) -> Victim:
    """One of the processes of the command with the process number `driver`; the command itself
    where there is none of the kind chosen."""
    (kind,) = rng.choices(list(KINDS), [weight for _, weight in KINDS.values()])
    title, _ = KINDS[kind]
    found = [pid for pid, line in descendants(driver).items() if title and title in line]
    return Victim(kind, rng.choice(found)) if found else Victim("driver", driver)


def kill(pid: int) -> bool:
    """False if it has ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def end_all() -> int:
    """Waits until no process is below this one, kills those that stay: how many that were."""
    deadline, killed = time.monotonic() + PATIENCE_S, 0
    while living := descendants(os.getpid()):
        if time.monotonic() > deadline:
            killed += sum(kill(pid) for pid in living)
        time.sleep(0.05)
    return killed


def descendants(root: int) -> dict[int, str]:
    """Command lines of the living processes below `root`, by process number."""
    found = {}
    with suppress(psutil.NoSuchProcess):  # the root has ended
        for process in psutil.Process(root).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended, or waits for its parent to hear it
                found[process.pid] = " ".join(process.cmdline())
    return found
