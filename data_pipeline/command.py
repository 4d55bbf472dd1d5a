"""What the commands of this package share: what they read of a configuration, how they end, tables.

A run's YAML file is read for its data and the few values that the plan of the data follows from;
what else stands in it is neither read nor checked.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from arbitor import errors
from arbitor.errors import UserError
from arbitor.settings import build, parse_value, read_yaml, section, set_value
from data_pipeline.files import ShardError
from data_pipeline.index import index_sources
from data_pipeline.run_data import RunData
from data_pipeline.schema import DataConfig


@dataclass(frozen=True)
class DataSettings:
    """The part of a run's configuration that its data follows from; the defaults are the run's."""

    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 1000
    seed: int = 0
    storage: str = "runs"  # holds the sample shards and the cache of the index
    num_workers: int = 1  # scaling.num_workers, of a range the fewest: each of them holds the most

    def validate(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps: expected at least 1, got {self.steps}")
        if not 1 <= self.num_workers <= self.data.slots_per_step:
            raise UserError(
                f"scaling.num_workers: expected 1 to {self.data.slots_per_step}"
                f" (data.slots_per_step), got {self.num_workers}"
            )


def read_settings(words: Sequence[str]) -> DataSettings:
    """From `CONFIG [key.path=value ...]`, in any order."""
    files = [word for word in words if not is_override(word)]
    if len(files) != 1:
        raise UserError(f"expected one CONFIG file, got {' and '.join(files) or 'none'}")
    values = read_yaml(files[0])
    set_values(values, words)
    known = {f.name for f in fields(DataSettings)}
    chosen = {key: value for key, value in values.items() if key in known}
    scaling = section(values, "scaling")
    if isinstance(scaling, Mapping) and "num_workers" in scaling:
        workers = scaling["num_workers"]
        chosen["num_workers"] = workers[0] if isinstance(workers, list) and workers else workers
    return build(DataSettings, chosen)


def set_values(values: dict[str, Any], words: Sequence[str]) -> None:
    """Takes in those of `words` that are `key.path=value`."""
    for word in words:
        if is_override(word):
            path, text = word.split("=", 1)
            set_value(values, path, parse_value(text))


def is_override(word: str) -> bool:
    """Whether a word is `key.path=value` and not a place such as `data/lang=en`."""
    key, equals, _ = word.partition("=")
    return bool(equals and re.fullmatch(r"[\w.-]+", key)) and not os.path.exists(word)


def open_data(settings: DataSettings) -> RunData:
    """Indexes the active sources, as the run does."""
    manifests = index_sources(settings.data, Path(settings.storage))
    return RunData(settings.data, manifests, settings.seed)


def end_with(command: Callable[[list[str]], int]) -> None:
    """Runs a command on the command line's words; a bad shard is a mistake too."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a file may have any name
    errors.end_with(command, ShardError)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns: the first is flush left, the others flush right; the first row heads."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def in_units(num_bytes: float) -> str:
    """`1.2 MiB`."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes, units = num_bytes / 1024, units[1:]
    return f"{num_bytes:.{0 if units[0] == 'bytes' else 1}f} {units[0]}"
