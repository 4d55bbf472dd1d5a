"""Which modality a shard looks like, where nobody has said it."""

import io
import json
import tarfile
from collections.abc import Iterable
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.files import BUFFER_BYTES, PatientFile
from data_pipeline.format.open_shard import (
    JSONL_SUFFIXES,
    PARQUET_SUFFIXES,
    TAR_SUFFIXES,
)
from data_pipeline.format.webdataset import ENDINGS

UNREADABLE = (OSError, EOFError, ValueError, IndexError, RecursionError, StopIteration)
MEMBERS = 16  # of a tar file that are looked at


def guess_modality(place: str) -> str:
    """The modality that a column, a key, a member or the file itself is called by, else "text".

    "text" also for a shard that cannot be parsed: reading it will tell. Raises ShardError.
    """
    names = _names(place)
    return next((modality for modality in ENDINGS if modality in names), "text")


def _names(place: str) -> Iterable[str]:
    name = place.lower()
    try:
        if name.endswith(PARQUET_SUFFIXES):
            return pq.ParquetFile(PatientFile(place)).schema_arrow.names
        if name.endswith(JSONL_SUFFIXES):
            with io.BufferedReader(PatientFile(place), BUFFER_BYTES) as file:
                row = json.loads(next(line for line in file if line.strip()))
            return row if isinstance(row, dict) else ()
        if name.endswith(TAR_SUFFIXES):
            return [_modality_of_file(member) for member in _members(place)]
    except (*UNREADABLE, pa.ArrowException, tarfile.TarError):
        return ()
    return [_modality_of_file(name)]


def _members(place: str) -> list[str]:
    with (
        io.BufferedReader(PatientFile(place), BUFFER_BYTES) as file,
        tarfile.open(fileobj=file, mode="r:") as tar,
    ):
        return [member.name for member in islice(tar, MEMBERS)]


def _modality_of_file(name: str) -> str:
    ending = name.rpartition(".")[2].lower()
    return next((modality for modality, known in ENDINGS.items() if ending in known), "")
