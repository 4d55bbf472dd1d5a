"""Shards in an object store: the rows, the fingerprint and the slots of the same files here."""

import subprocess
import sys

import pyarrow.fs
import pytest

from arbitor.errors import UserError
from data_pipeline.files import find_files
from data_pipeline.run_data import read_slots
from data_pipeline.schema import SourceConfig
from tests.data_pipeline.media_shards import SHAPE, media_rows, write_media_parquet
from tests.data_pipeline.shards import numbered_rows, run_data, write_parquet


def test_slots_from_a_bucket_are_those_of_the_files(tmp_path, bucket):
    folder = tmp_path / "here"
    folder.mkdir()
    write_parquet(folder / "a b#1.parquet", numbered_rows(100))
    write_media_parquet(folder / "images.parquet", media_rows("image", 40), "image")
    pyarrow.fs.copy_files(str(folder), "shards/sub", destination_filesystem=bucket)

    def data(root: str):
        sources = {
            "text": SourceConfig("text", f"{root}/a*.parquet"),
            "image": SourceConfig("image", f"{root}/images.parquet"),
        }
        return run_data(tmp_path / "storage", sources, **SHAPE)

    here, there = data(str(folder)), data("s3://shards/sub")
    assert there.manifests["text"].shards == ("s3://shards/sub/a%20b%231.parquet",)
    assert there.fingerprint == here.fingerprint
    slots = [[slot.sha256 for slot in read_slots(run, 0, 30, 0, 1)] for run in (here, there)]
    assert slots[0] == slots[1] and len(set(slots[0])) > 100
    # A process of its own: those that lint starts have the environment of its first use in one.
    lint = [sys.executable, "-m", "data_pipeline.lint", "s3://shards/sub/images.parquet"]
    told = subprocess.run(lint, capture_output=True, text=True, timeout=120)
    assert (told.returncode, "clean: all 40 rows" in told.stdout) == (0, True), told


@pytest.mark.parametrize("place", ["s3://shards/none", "s3://no-such-bucket/x.parquet"])
def test_what_a_bucket_does_not_hold_is_told(bucket, place):
    with pytest.raises(UserError, match=f"key: {place} does not exist"):
        find_files("key", place)
