"""The reader that fits a shard's name."""

from arbitor.errors import UserError
from arbitor.modality import BYTE_MODALITIES
from data_pipeline.format.jsonl import JsonlShard
from data_pipeline.format.parquet import ParquetShard
from data_pipeline.format.plain_text import PlainTextShard
from data_pipeline.format.shard import Columns, MediaShard, TextShard
from data_pipeline.format.webdataset import WebDatasetShard

PARQUET_SUFFIXES = (".parquet", ".pq")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
TAR_SUFFIXES = (".tar",)
ROW_SUFFIXES = PARQUET_SUFFIXES + JSONL_SUFFIXES + TAR_SUFFIXES
UNREAD_SUFFIXES = (".gz", ".tgz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".7z", ".arrow")


def open_shard(place: str, modality: str, columns: Columns) -> TextShard | MediaShard:
    """A `TextShard` of text and code, a `MediaShard` of the other modalities."""
    check_name(place)
    name = place.lower()
    if name.endswith(PARQUET_SUFFIXES):
        return ParquetShard(place, columns)
    if name.endswith(JSONL_SUFFIXES):
        return JsonlShard(place, columns)
    if name.endswith(TAR_SUFFIXES):
        return WebDatasetShard(place, columns, modality)
    if modality in BYTE_MODALITIES:
        return PlainTextShard(place)
    raise UserError(
        f"{place}: {modality} rows are read from {', '.join(ROW_SUFFIXES)}; put them in one"
    )


def check_name(place: str) -> None:
    """Raises UserError for a file that would be taken for plain text and is not."""
    for suffix in UNREAD_SUFFIXES:
        if place.lower().endswith(suffix):
            raise UserError(
                f"{place}: {suffix} files are not read; unpack it, or write its rows as Parquet, or"
                " leave it out with a glob such as **/*.parquet"
            )
