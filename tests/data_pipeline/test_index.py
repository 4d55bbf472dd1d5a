"""Indexing: what is counted and held out, and each mistake of the user."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arbitor.errors import UserError
from data_pipeline.format import jsonl, plain_text
from data_pipeline.index import index_sources
from data_pipeline.manifest import manifests_from_json, manifests_to_json
from data_pipeline.read import read_segments
from data_pipeline.schema import DataConfig, SourceConfig
from tests.data_pipeline.shards import numbered_rows, write_jsonl, write_parquet


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Files of a few kilobytes then have several groups."""
    monkeypatch.setattr(jsonl, "GROUP_BYTES", 3000)
    monkeypatch.setattr(plain_text, "GROUP_BYTES", 3000)


def index(path, eval_fraction=0.02, **source):
    storage = path.parent / "storage"
    config = DataConfig({"s": SourceConfig(path=str(path), **source)}, eval_fraction=eval_fraction)
    config.validate()
    return index_sources(config, storage)["s"]


def read(manifest, segments):
    shards = dict(enumerate(manifest.shards))
    return read_segments(shards, manifest.columns, segments)[0]


def write(path, rows):
    {".parquet": write_parquet, ".jsonl": write_jsonl}[path.suffix](path, rows)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("fraction", [0, 0.02, 0.07, 0.5, 0.999])
def test_rows_are_split_once_and_nothing_is_lost(tmp_path, suffix, fraction):
    rows = numbered_rows(100)
    rows[13], rows[14], rows[40] = None, "", "\N{SNOWMAN} \n two lines"
    for part in (0, 1):
        write(tmp_path / f"part{part}{suffix}", rows[50 * part : 50 * part + 50])
    manifest = index(tmp_path, fraction)
    train = read(manifest, manifest.train_segments)
    held_out = read(manifest, manifest.eval_segments)
    content = [(row or "").encode() for row in rows]
    assert train + held_out == content
    assert len(held_out) == {0: 0, 0.02: 2, 0.07: 7, 0.5: 50, 0.999: 99}[fraction]
    assert manifest.rows == len(train) and len(manifest.train_segments) > 1 - (fraction > 0.9)
    assert manifest.symbols == sum(len(row) + 1 for row in train if row)


@pytest.mark.parametrize("size", [1, 900, 5000, 300_000])
def test_plain_text_is_cut_at_line_ends_and_joins_again(tmp_path, size):
    lines = "".join(f"{row}\n" for row in numbered_rows(2000))[: size - 1] + "!"
    text = lines[: size // 2] + "y" * min(20_000, size // 3) + lines[size // 2 :]  # a long line
    path = tmp_path / "book.txt"
    path.write_text(text)
    manifest = index(path, 0)
    rows = read(manifest, manifest.train_segments)
    assert b"".join(rows).decode() == text
    limit = min(64 << 10, max(1 << 10, len(text) // 64))
    assert max(map(len, rows)) <= limit
    assert all(row.endswith(b"\n") or len(row) == limit or row is rows[-1] for row in rows[:-1])
    assert len(rows) <= 2 + 4 * math.ceil(len(text) / limit)


def test_files_of_a_folder_come_sorted_and_hidden_or_empty_ones_do_not(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name in ("b.txt", "a.md", "sub/c.py", ".hidden", "sub/.git/config"):
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.py").write_text("")
    manifest = index(tmp_path)
    rows = read(manifest, manifest.train_segments + manifest.eval_segments)
    assert rows == [b"a.md", b"b.txt", b"sub/c.py"]
    assert len(index(tmp_path / "*.*").shards) == 2


def test_a_large_group_is_cut_into_segments(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.scan.SEGMENT_SYMBOLS", 1000)
    path = tmp_path / "one_group.parquet"
    write_parquet(path, numbered_rows(100), group=100)
    manifest = index(path)
    assert len(manifest.train_segments) > 10
    assert max(s.symbols for s in manifest.train_segments) <= 1000
    rows = [row.encode() for row in numbered_rows(100)]
    assert read(manifest, manifest.train_segments + manifest.eval_segments) == rows


def test_the_fingerprint_is_of_content_not_of_place(tmp_path):
    for folder, rows in (("a", numbered_rows(50)), ("b", numbered_rows(50)), ("c", ["x"] * 50)):
        (tmp_path / folder).mkdir()
        write_parquet(tmp_path / folder / "rows.parquet", rows)
    one, two, other = (index(tmp_path / folder) for folder in "abc")
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert index(tmp_path / "a", 0.3).fingerprint != one.fingerprint
    assert manifests_from_json(manifests_to_json({"s": one})) == {"s": one}


def test_an_inactive_source_is_not_opened(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", numbered_rows(5))
    sources = {
        "on": SourceConfig(path=str(tmp_path)),
        "off": SourceConfig("video", "/nowhere", weight=0),
        "never": SourceConfig("image", "", weight=[[0, 0.0], [10, 0.0]]),
    }
    config = DataConfig(sources)
    config.validate()
    assert list(index_sources(config, tmp_path / "storage")) == ["on"]


def mistakes(folder):
    """name -> (path, source options, what the message must contain)."""
    write_parquet(folder / "good.parquet", numbered_rows(20))
    write_jsonl(folder / "one.jsonl", ["only row"])
    write_jsonl(folder / "nothing.jsonl", ["", None, ""])
    write_jsonl(folder / "empty_end.jsonl", ["a row", "", ""])
    (folder / "folder").mkdir()
    (folder / "empty.txt").write_text("")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "corrupt.parquet").write_text("PAR1 this is no Parquet file PAR1")
    data = bytearray((folder / "good.parquet").read_bytes())
    data[4:400] = bytes(396)
    (folder / "corrupt_inside.parquet").write_bytes(data)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "no_rows.parquet")
    filler = "".join(f'{{"text": "{row}"}}\n' for row in numbered_rows(100))
    (folder / "bad.jsonl").write_text(filler + '{"text": \n')
    (folder / "keyless.jsonl").write_text('{"text": "a"}\n{"content": "b"}\n')
    (folder / "number.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (folder / "list.jsonl").write_text('{"text": "a"}\n["b"]\n')
    return {
        "missing": ("missing.txt", {}, ["data.sources.s.path", "missing.txt", "does not exist"]),
        "empty folder": ("folder", {}, ["no shards", "folder"]),
        "glob": ("*.csv", {}, ["no file matches", "*.csv"]),
        "empty file": ("empty.txt", {}, ["empty.txt", "is empty"]),
        "blank": ("blank.jsonl", {}, ["data.sources.s.path", "no rows"]),
        "no rows": ("no_rows.parquet", {}, ["data.sources.s.path", "no rows"]),
        "corrupt": ("corrupt.parquet", {}, ["corrupt.parquet", "not a readable Parquet file"]),
        "inside": ("corrupt_inside.parquet", {}, ["corrupt_inside.parquet", "row group 0"]),
        "column": ("good.parquet", {"text_column": "body"}, ["good.parquet", "'body'", "id, text"]),
        "type": ("good.parquet", {"text_column": "id"}, ["good.parquet", "int64", "string"]),
        "json": ("bad.jsonl", {}, ["bad.jsonl:101:", "not valid JSON"]),
        "key": ("keyless.jsonl", {}, ["keyless.jsonl:2:", "'text'", "content"]),
        "value": ("number.jsonl", {}, ["number.jsonl:2:", "int", "string"]),
        "list": ("list.jsonl", {}, ["list.jsonl:2:", "list"]),
        "one row": ("one.jsonl", {}, ["1 row", "data.eval_fraction=0"]),
        "all empty": ("nothing.jsonl", {}, ["nothing.jsonl", "empty"]),
        "held-out empty": ("empty_end.jsonl", {}, ["data.eval_fraction", "empty"]),
        "sample": ("sample://smell", {}, ["sample://smell", "sample://text"]),
    }


def test_every_mistake_is_one_line_that_names_the_culprit(tmp_path):
    for name, (path, source, expected) in mistakes(tmp_path).items():
        place = path if "://" in path else tmp_path / path
        config = DataConfig({"s": SourceConfig(path=str(place), **source)})
        with pytest.raises(UserError) as caught:
            index_sources(config, tmp_path / "storage")
        message = str(caught.value)
        assert "\n" not in message, name
        for part in expected:
            assert part in message, (name, message)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"batch_size": 0}, "data.batch_size: must be at least 1"),
        ({"sequence_length": -1}, "data.sequence_length: must be at least 1"),
        ({"slots_per_step": 0}, "data.slots_per_step: must be at least 1"),
        ({"eval_slots": 0}, "data.eval_slots: must be at least 1"),
        ({"eval_fraction": 1.0}, "data.eval_fraction: must be from 0"),
        ({"sources": {}}, "data.sources: at least one source"),
        ({"sources": {"a b": SourceConfig(path="x")}}, "data.sources.a b: a source's name"),
        ({"sources": {"a": SourceConfig("smell", "x")}}, "data.sources.a.modality: unknown"),
        (
            {"sources": {"a": SourceConfig("image", "x")}, "sequence_length": 100},
            "data.image.sequence_length: 256 does not divide the 400 positions",
        ),
        ({"sources": {"a": SourceConfig(path="x", max_epochs=-1)}}, "data.sources.a.max_epochs"),
        (
            {"sources": {"a": SourceConfig(path="x", when_exhausted="die")}},
            "data.sources.a.when_exhausted: expected drop",
        ),
        ({"max_bad_fraction": 1.0}, "data.max_bad_fraction: must be from 0"),
        ({"sources": {"a": SourceConfig()}}, "data.sources.a.path: missing"),
        ({"sources": {"a": SourceConfig(path="x", weight=-1.0)}}, "data.sources.a.weight"),
        ({"sources": {"a": SourceConfig(path="x", weight=math.nan)}}, "finite"),
        ({"sources": {"a": SourceConfig(path="x", weight=[])}}, "[[step, weight], ...]"),
        ({"sources": {"a": SourceConfig(path="x", weight=[[1.0]])}}, "[[step, weight], ...]"),
        ({"sources": {"a": SourceConfig(path="x", weight=[[0.5, 1.0]])}}, "whole number"),
        ({"sources": {"a": SourceConfig(path="x", weight=[[5, 1.0], [5, 2.0]])}}, "increase"),
        ({"sources": {"a": SourceConfig(path="x", weight=0.0)}}, "at least one source"),
        (
            {"sources": {"a": SourceConfig(path="x", weight=[[0, 1.0], [20, 0.0]])}},
            "data.sources: at step 20 all weights are zero",
        ),
    ],
)
def test_config_mistakes_name_their_key(config, expected):
    with pytest.raises(UserError) as caught:
        DataConfig(**{"sources": {"a": SourceConfig(path="x")}, **config}).validate()
    assert expected in str(caught.value) and "\n" not in str(caught.value)
