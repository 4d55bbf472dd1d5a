"""Prose: the language reference (pydoc's topics), the license, and the modules' docstrings."""

import ast
import warnings
from collections.abc import Iterator
from pydoc_data.topics import topics

import pyarrow as pa

from data_pipeline.sample_rows.code import LIBRARY, module_sources, shuffled


def rows() -> pa.Table:
    texts = [text for _, text in sorted(topics.items())]
    texts += [path.read_text("utf-8") for path in sorted(LIBRARY.glob("LICENSE*"))]
    for source in module_sources():
        docstrings = "\n\n".join(_docstrings(source))
        if docstrings:
            texts.append(docstrings)
    return shuffled(pa.table({"text": texts}))


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
