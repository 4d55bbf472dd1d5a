"""What the made media share: balanced attributes, chance from a key, and the table's form.

The form is Hugging Face's: struct{bytes, path}, and features in the schema, so that
`datasets.load_dataset("parquet", ...)` shows pictures and plays sound.
"""

import json
import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

from data_pipeline.permutation import keyed_permutation, random_words

Attributes = tuple[Any, ...]


def balanced(
    count: int, first: Sequence[Any], *others: Sequence[Any], key: str
) -> list[Attributes]:
    """`count` tuples (first, *others): any len(first) rows in turn have each value of `first`.

    The combinations of the others come in a random order for each, all before any again.
    """
    combinations = list(product(*others))
    rows = []
    for i in range(count):
        turn, value = divmod(i, len(first))
        epoch, place = divmod(turn, len(combinations))
        order = keyed_permutation(len(combinations), "sample", key, value, epoch)
        rows.append((first[value], *combinations[order[place]]))
    return rows


def interleaved(a: Sequence[Any], b: Sequence[Any]) -> list[Attributes]:
    """All pairs, in an order in which a few in turn have every value of both."""
    period = math.lcm(len(a), len(b))
    count = len(a) * len(b)
    return [(a[k % len(a)], b[(k + k // period) % len(b)]) for k in range(count)]


def uniforms(count: int, *key: str | int) -> np.ndarray:
    """float64 [count] in 0..1, determined by `key` alone."""
    return (random_words(count, "sample", *key) >> 11) / 2**53


def media_table(
    column: str, suffix: str, contents: Sequence[bytes], texts: Sequence[str], **more: Sequence[Any]
) -> pa.Table:
    """Columns `column` (bytes and path), `text`, and `more` of integers."""
    media = [
        {"bytes": content, "path": f"{column}-{i:05}.{suffix}"}
        for i, content in enumerate(contents)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {column: pa.array(media, kind), "text": pa.array(texts, pa.string())}
    columns |= {name: pa.array(values, pa.int64()) for name, values in more.items()}
    features = {column: {"_type": column.capitalize()}}
    features |= {"text": {"dtype": "string", "_type": "Value"}}
    features |= {name: {"dtype": "int64", "_type": "Value"} for name in more}
    description = json.dumps({"info": {"features": features}})
    return pa.table(columns).replace_schema_metadata({"huggingface": description})
