"""Indexing: what is counted and held out, and each mistake of the user."""

import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arbitor.errors import UserError
from data_pipeline import files, scan
from data_pipeline.format import jsonl, plain_text
from data_pipeline.index import index_sources
from data_pipeline.manifest import changes, manifests_from_json, manifests_to_json
from data_pipeline.read import read_media_segments, read_segments
from data_pipeline.schema import DataConfig, SourceConfig
from tests.data_pipeline.media_shards import WRITERS
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


def write_shards(folder, count, first=0):
    folder.mkdir(exist_ok=True)
    for i in range(first, first + count):
        write_parquet(folder / f"part-{i:02}.parquet", numbered_rows(20, f"s{i}r"))


def scanned(monkeypatch, fail_at=None):
    """The names of the shards that are really read, as they are."""
    names, really = [], scan.scan

    def watched(place, *arguments):
        if place.endswith(fail_at or "nothing"):
            raise KeyboardInterrupt
        names.append(Path(place).name)
        return really(place, *arguments)

    monkeypatch.setattr(scan, "scan", watched)
    return names


def test_an_index_pass_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", 12)
    with monkeypatch.context() as patch:
        first = scanned(patch, fail_at="part-08.parquet")
        with pytest.raises(KeyboardInterrupt):
            index(tmp_path / "shards")
    second = scanned(monkeypatch)
    whole = index(tmp_path / "shards")
    assert len(first) >= 8 and sorted(first + second) == [f"part-{i:02}.parquet" for i in range(12)]
    second.clear()
    assert index(tmp_path / "shards") == whole and not second
    write_parquet(tmp_path / "shards" / "part-03.parquet", numbered_rows(21, "other"))
    assert index(tmp_path / "shards") != whole and second == ["part-03.parquet"]
    second.clear()
    (tmp_path / "storage" / "index").rename(tmp_path / "elsewhere")
    assert len(index(tmp_path / "shards").shards) == 12 and len(second) == 12


def test_a_long_pass_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    write_shards(tmp_path / "shards", 3)
    monkeypatch.setattr("data_pipeline.progress.LINE_SECONDS", 0.0)
    index(tmp_path / "shards")
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert re.fullmatch(r"indexing data.sources.s: \d\d%, 20 rows, \d+ s left", lines[0])
    assert len(lines) == 3 and not said.out


def test_an_entry_of_the_cache_that_is_torn_is_written_again(tmp_path, monkeypatch):
    write_shards(tmp_path / "shards", 2)
    whole = index(tmp_path / "shards")
    for entry, content in zip((tmp_path / "storage" / "index").iterdir(), ("", "[[0"), strict=True):
        entry.write_text(content)
    names = scanned(monkeypatch)
    assert index(tmp_path / "shards") == whole and len(names) == 2
    assert index(tmp_path / "shards") == whole and len(names) == 2


def test_a_storage_that_cannot_be_written_is_told(tmp_path):
    write_shards(tmp_path / "shards", 1)
    (tmp_path / "storage").write_text("a file")
    for path in (str(tmp_path / "shards"), "sample://text"):
        config = DataConfig({"s": SourceConfig(path=path)})
        with pytest.raises(UserError, match="^storage: .*/storage.* cannot be written"):
            index_sources(config, tmp_path / "storage")


def test_a_shard_lost_between_scan_and_cut_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RETRY_AFTER_S", (0,))
    path = tmp_path / "rows.parquet"
    write_parquet(path, numbered_rows(30))
    index(path)
    found = files.find_files("key", str(path))
    monkeypatch.setattr("data_pipeline.index.find_files", lambda key, place: found)
    path.unlink()
    with pytest.raises(UserError, match="rows.parquet: cannot be read"):
        index(path)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
def test_text_of_any_type_of_string(tmp_path, kind):
    rows = ["one", None, "\N{SNOWMAN}", "one"]
    column = pa.array(rows, pa.string())
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "rows.parquet")
    manifest = index(tmp_path / "rows.parquet", 0)
    content = [(row or "").encode() for row in rows]
    assert read(manifest, manifest.train_segments) == content


def test_what_changed_is_told_by_shard(tmp_path):
    folder = tmp_path / "shards"
    write_shards(folder, 4)
    before = {"s": index(folder)}
    assert changes(before, {"s": index(folder)}) == []
    shutil.copytree(folder, tmp_path / "moved")
    assert changes(before, {"s": index(tmp_path / "moved")}) == []
    (folder / "part-01.parquet").unlink()
    write_parquet(folder / "part-02.parquet", numbered_rows(20, "other"))
    write_shards(folder, 1, first=9)
    assert changes(before, {"s": index(folder)}) == [
        f"s: changed {folder}/part-02.parquet",
        f"s: removed {folder}/part-01.parquet",
        f"s: added {folder}/part-09.parquet",
    ]
    assert changes(before, {"s": index(tmp_path / "moved", 0.5)}) == [
        "s: the same shards, in another order or split otherwise"
    ]
    assert changes(before, {"t": before["s"]}) == [
        "s: removed the whole source",
        "t: added the whole source",
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_media_are_indexed_without_being_read(tmp_path, name):
    """Their content may be anything; rows are counted and split all the same."""
    rows = [(b"not an image" * n, f"n{n}.") for n in range(1, 31)]
    WRITERS[name](tmp_path / name, rows, "image")
    config = DataConfig({"s": SourceConfig("image", str(tmp_path / name))}, eval_fraction=0.1)
    manifest = index_sources(config, tmp_path / "storage")["s"]
    assert manifest.rows == 27 and sum(s.rows for s in manifest.eval_segments) == 3
    assert manifest.num_bytes > 0 and manifest.symbols == 0
    found = read_media_segments(
        {0: str(tmp_path / name)}, "image", manifest.columns, manifest.train_segments
    )[0]
    assert [(row.content, row.text.decode()) for row in found] == rows[:27]
    first = [(s.first_row + s.row_start, s.rows) for s in manifest.train_segments]
    assert first[0][0] == 0 and all(a + n == b for (a, n), (b, _) in pairwise(first))
    assert manifests_from_json(manifests_to_json({"s": manifest})) == {"s": manifest}


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
