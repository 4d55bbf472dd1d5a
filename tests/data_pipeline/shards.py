"""Shards for tests: every row says its own number, so that symbols tell which rows they are."""

import json
import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.index import index_sources
from data_pipeline.run_data import RunData
from data_pipeline.schema import DataConfig, SourceConfig


def numbered_rows(count: int, name: str = "row", largest: int = 300) -> list[str]:
    """Rows such as 'row17 xxxx.' of up to `largest` bytes; the number of x is random but fixed."""
    rng = random.Random(name)
    return [f"{name}{i} {'x' * rng.randrange(largest)}." for i in range(count)]


def row_numbers(symbols, name: str = "row") -> list[int]:
    """The numbers of the rows that begin in `symbols`."""
    text = bytes(value if value < 256 else 0 for value in symbols.ravel().tolist()).decode()
    return [int(number) for number in re.findall(rf"{name}(\d+) ", text)]


def write_parquet(path: Path, rows: list, group: int = 8, column: str = "text") -> None:
    pq.write_table(pa.table({"id": range(len(rows)), column: rows}), path, row_group_size=group)


def write_jsonl(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def run_data(folder: Path, sources: dict[str, SourceConfig], seed: int = 0, **config) -> RunData:
    config = DataConfig(sources, **config)
    config.validate()
    return RunData(config, index_sources(config, folder), seed)
