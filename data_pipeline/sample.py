"""Small real shards of every modality: `sample://text`, code, image, audio and video.

Nothing is downloaded: prose and code are the running Python's standard library, pictures and
sounds are drawn here. The same Python with the same libraries gives the same bytes.

    python -m data_pipeline.sample --out DIR [--times N]
"""

import argparse
import os
import tempfile
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from arbitor.errors import UserError
from arbitor.modality import BYTE_MODALITIES, MODALITIES

SAMPLE_PREFIX = "sample://"
NUM_SHARDS = 3
ROWS_PER_GROUP = {"text": 16, "code": 16, "image": 64, "audio": 32, "video": 32}


def ensure_sample(modality: str, folder: Path, times: int = 1) -> Path:
    """The folder of `modality`'s sample shards under `folder`, made if it is not there yet.

    Of pictures, sounds and film it is made with `times` as many rows.

    Raises UserError for a modality without a sample.
    """
    if modality not in MODALITIES:
        known = " or ".join(SAMPLE_PREFIX + name for name in MODALITIES)
        raise UserError(f"{SAMPLE_PREFIX}{modality}: there is no such sample; use {known}")
    complete = Path(folder) / modality
    if not complete.exists():
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
            partial = Path(temporary) / modality
            # Imported when needed: the encoders of one modality are of no use to another.
            module = import_module(f"data_pipeline.sample_rows.{modality}")
            rows = module.rows() if modality in BYTE_MODALITIES else module.rows(times)
            _write_shards(rows, partial, ROWS_PER_GROUP[modality])
            _publish(partial, complete)
    return complete


def sample_command(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline.sample",
        description="Writes small shards of all five modalities; those that are there stay.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--times", type=int, default=1, help="so many times as many pictures, sounds and films"
    )
    options = parser.parse_args(words)
    out, times = options.out, options.times
    if times < 1:
        raise UserError(f"--times: expected at least 1, got {times}")
    for modality in MODALITIES:
        try:
            shards = sorted(ensure_sample(modality, out, times).iterdir())
        except OSError as error:
            raise UserError(
                f"--out {out}: cannot be written to ({error.strerror}); name a folder"
            ) from error
        for shard in shards:
            rows = pq.read_metadata(shard).num_rows
            print(f"{shard}: {rows:,} rows, {shard.stat().st_size / 1e6:.1f} MB", flush=True)
    return 0


def _publish(partial: Path, complete: Path) -> None:
    """Renames; where another process was faster, its folder stays."""
    try:
        os.rename(partial, complete)
    except OSError:
        if not complete.exists():
            raise


def _write_shards(table: pa.Table, folder: Path, rows_per_group: int) -> None:
    folder.mkdir()
    rows = -(-table.num_rows // NUM_SHARDS)
    for i in range(NUM_SHARDS):
        path = folder / f"part-{i}-of-{NUM_SHARDS}.parquet"
        pq.write_table(table.slice(i * rows, rows), path, row_group_size=rows_per_group)


if __name__ == "__main__":
    from data_pipeline.command import end_with  # which needs the index, and that this module

    end_with(sample_command)
