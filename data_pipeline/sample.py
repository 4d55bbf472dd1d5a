"""Small real shards from the running Python's standard library: `sample://text`, `sample://code`.

Nothing is downloaded: prose is the language reference (pydoc's topics), the license and the
modules' docstrings; code is the modules themselves. The same Python gives the same bytes.

    python -m data_pipeline.sample --out DIR
"""

import argparse
import ast
import os
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq

from arbitor.errors import UserError
from data_pipeline.permutation import keyed_permutation

SAMPLE_PREFIX = "sample://"
LIBRARY = Path(sysconfig.get_path("stdlib"))
NUM_SHARDS = 3
ROWS_PER_GROUP = 16
CODE_BYTES = 3 << 20
SKIPPED_FOLDERS = {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"}


def ensure_sample(modality: str, folder: Path) -> Path:
    """The folder of `modality`'s sample shards under `folder`, made if it is not there yet.

    Raises UserError for a modality without a sample.
    """
    tables = {"text": _text_table, "code": _code_table}
    if modality not in tables:
        known = " or ".join(SAMPLE_PREFIX + name for name in tables)
        raise UserError(f"{SAMPLE_PREFIX}{modality}: there is no such sample; use {known}")
    complete = Path(folder) / modality
    if not complete.exists():
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
            partial = Path(temporary) / modality
            _write_shards(tables[modality](), partial)
            _publish(partial, complete)
    return complete


def main() -> None:
    parser = argparse.ArgumentParser(description="Write small text and code shards.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    out = parser.parse_args().out
    for modality in ("text", "code"):
        for shard in sorted(ensure_sample(modality, out).iterdir()):
            rows = pq.read_metadata(shard).num_rows
            print(f"{shard}: {rows} rows, {shard.stat().st_size / 1e6:.1f} MB")


def _publish(partial: Path, complete: Path) -> None:
    """Renames; where another process was faster, its folder stays."""
    try:
        os.rename(partial, complete)
    except OSError:
        if not complete.exists():
            raise


def _write_shards(table: pa.Table, folder: Path) -> None:
    """Rows shuffled, so that the held-out last ones are like the others."""
    folder.mkdir()
    table = table.take(keyed_permutation(table.num_rows, "sample"))
    rows = -(-table.num_rows // NUM_SHARDS)
    for i in range(NUM_SHARDS):
        path = folder / f"part-{i}-of-{NUM_SHARDS}.parquet"
        pq.write_table(table.slice(i * rows, rows), path, row_group_size=ROWS_PER_GROUP)


def _text_table() -> pa.Table:
    rows = [text for _, text in sorted(topics.items())]
    rows += [path.read_text("utf-8") for path in sorted(LIBRARY.glob("LICENSE*"))]
    for source in _module_sources():
        docstrings = "\n\n".join(_docstrings(source))
        if docstrings:
            rows.append(docstrings)
    return pa.table({"text": rows})


def _code_table() -> pa.Table:
    """Every n-th module, so that all of the library is seen."""
    sources = [source for source in _module_sources() if source]
    total = sum(map(len, sources))
    rows = sources[:: max(1, round(total / CODE_BYTES))]
    return pa.table({"text": rows, "language": ["python"] * len(rows)})


def _module_sources() -> Iterator[str]:
    for folder, subfolders, files in os.walk(LIBRARY):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name).read_text("utf-8")


def _docstrings(source: str) -> Iterator[str]:
    with warnings.catch_warnings(action="ignore"):  # the library's own odd escapes
        tree = ast.parse(source)
    for definition in _definitions(tree):
        docstring = ast.get_docstring(definition)
        if docstring:
            yield docstring


def _definitions(node: ast.AST) -> Iterator[ast.AST]:
    """The module, its classes and functions, and theirs; `ast.walk` would see every expression."""
    yield node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definitions(child)


if __name__ == "__main__":
    main()
