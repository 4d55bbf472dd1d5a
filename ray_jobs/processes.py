"""Which process is which: names that hold over hosts, boots, containers and numbers used again."""

import os
import signal
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Names this process among all of all hosts and times."""
    return {
        "host": socket.gethostname(),
        "place": _place(),
        "pid": os.getpid(),
        "started": _state(os.getpid())[1],
    }


def is_here(process: dict[str, Any]) -> bool:
    """Whether that process would be seen from here, if it lived."""
    return process["place"] == _place()


def is_running(process: dict[str, Any]) -> bool:
    """Whether that process, of this place, lives; another one may have its number by now."""
    try:
        state, started = _state(process["pid"])
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends meanwhile
        return False
    return started == process["started"] and state not in ("Z", "X")


def end(process: dict[str, Any]) -> bool:
    """Kills that process of this place; False where it had ended before."""
    if not is_running(process):
        return False
    try:
        os.kill(process["pid"], signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def describe(process: dict[str, Any]) -> str:
    return f"process {process['pid']} on {process['host']}"


def replace_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Whoever reads the file finds the text before or this one, whole.

    `durable`: also after a loss of power. A heartbeat does without: it must not wait for the disk.
    """
    partial = path.with_suffix(f".{os.getpid()}")
    with open(partial, "w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)


def _place() -> str:
    """This boot of this host, and the container: process numbers mean something inside of it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _state(pid: int) -> tuple[str, int]:
    """A letter, and when the process began, in ticks since the boot."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])
