"""Code: the modules of the running Python's standard library."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from data_pipeline.permutation import keyed_permutation

LIBRARY = Path(sysconfig.get_path("stdlib"))
CODE_BYTES = 3 << 20
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}


def rows() -> pa.Table:
    """Every n-th module, so that all of the library is seen."""
    sources = [source for source in module_sources() if source]
    total = sum(map(len, sources))
    sources = sources[:: max(1, round(total / CODE_BYTES))]
    return shuffled(pa.table({"text": sources, "language": ["python"] * len(sources)}))


def module_sources() -> Iterator[str]:
    for folder, subfolders, files in os.walk(LIBRARY):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name).read_text("utf-8")


def shuffled(table: pa.Table) -> pa.Table:
    """So that the held-out last rows are like the others."""
    return table.take(keyed_permutation(table.num_rows, "sample"))
