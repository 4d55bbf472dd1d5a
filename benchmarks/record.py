"""The record of a benchmark's run: what was asked, where and when in git it ran, its findings."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "triton", "numpy", "pyarrow", "ray", "av", "pillow", "soundfile", "soxr")


def out_path(text: str) -> Path:
    """The type of --out: a wrong one is refused before a run of hours, not after it."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"{path.parent} cannot be made: {error.strerror}; name a file in a folder"
        raise argparse.ArgumentTypeError(problem) from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written; name a file in a folder")
    return path


class Record:
    """Made before the run: its command, options, environment and the load that it found."""

    def __init__(self, options: argparse.Namespace):
        self._load = os.getloadavg()
        self._about = {
            "command": command(),
            "environment": environment(),
            "options": {k: plain(value) for k, value in vars(options).items() if k != "out"},
        }

    def of(self, **found: Any) -> dict[str, Any]:
        """The record of a run that found this."""
        load = {"before": self._load, "after": os.getloadavg()}
        return self._about | {"load_average": load} | found

    def write(self, out: Path | None, **found: Any) -> dict[str, Any]:
        """The record, in the file `out` where there is one."""
        record = self.of(**found)
        if out:
            save(out, record)
        return record


def save(out: Path, record: dict[str, Any]) -> None:
    """Whoever reads the file finds the record before or this one, whole."""
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(out)


def command() -> str:
    """The one to run again in a checkout."""
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    return " ".join(["python -m", module, *map(portable, sys.argv[1:])])


def plain(value: Any) -> Any:
    """An option as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return portable(str(value)) if isinstance(value, (str, Path)) else value


def portable(argument: str) -> str:
    """Without the folders of a path that is not below the checkout's."""
    return re.sub(r"(?<![\w:/])(/|\.+\w*/)([^\s/]+/)*", "", argument)


def environment() -> dict[str, Any]:
    """Hardware, versions and commit."""
    return {
        **_device(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: version for name in LIBRARIES if (version := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "changed_since_commit": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _device() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"device": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"}
    query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
    smi = _output("nvidia-smi", query, "--format=csv,noheader")
    return {"device": torch.cuda.get_device_name(), "driver, clock, power limit": smi}


def _cpu_model() -> str:
    told = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return told[1] if told else platform.processor()


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(ROOT), *arguments)


def _output(*words: str) -> str:
    """Empty where there is no such program, or no checkout."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""
