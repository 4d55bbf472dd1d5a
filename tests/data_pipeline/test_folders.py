"""Which files of a folder or a glob are a source's shards, and which are refused by their name."""

import pytest

from arbitor.errors import UserError
from data_pipeline.files import find_files, read_file
from data_pipeline.index import find_shards, index_sources
from data_pipeline.schema import DataConfig, SourceConfig
from tests.data_pipeline.shards import numbered_rows, write_jsonl, write_parquet


def shards(folder, modality="text", pattern=""):
    """The names of the chosen files, relative to the folder."""
    source = SourceConfig(modality, f"{folder}/{pattern}".rstrip("/"))
    found = find_shards("data.sources.s", source, folder / "storage")
    return [file.place.removeprefix(f"{folder}/") for file in found]


def snapshot(folder):
    """What Hugging Face hands out, and Spark and Delta leave beside it."""
    (folder / "data" / "_delta_log").mkdir(parents=True)
    write_parquet(folder / "data" / "train-0.parquet", numbered_rows(200))
    write_parquet(folder / "data" / "_delta_log" / "1.checkpoint.parquet", ["log"])
    write_parquet(folder / "_part.parquet", ["unfinished"])
    for name in ("README.md", "dataset_infos.json", "_metadata"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("modality", ["text", "code", "image"])
def test_beside_files_of_rows_no_other_file_is_a_shard(tmp_path, modality, capsys):
    assert shards(snapshot(tmp_path), modality) == ["data/train-0.parquet"]
    assert shards(tmp_path, modality, "**/*") == ["data/train-0.parquet"]
    if modality != "image":
        told = capsys.readouterr().err.splitlines()
        assert told[0].startswith(
            "data.sources.s.path: 5 of 6 files are left out (README.md, _metadata, "
        )
    assert shards(tmp_path, modality, "_part.parquet") == ["_part.parquet"]


def test_a_folder_of_programs_is_read_in_spite_of_a_few_rows_in_it(tmp_path, capsys):
    (tmp_path / "tests").mkdir()
    for name in ("_private.py", "__init__.py", "a.py", "tests/b.c"):
        (tmp_path / name).write_text(f"# {name}\n" * 1000)
    write_jsonl(tmp_path / "tests" / "cases.jsonl", ["a", "b"])
    assert shards(tmp_path, "code") == ["__init__.py", "_private.py", "a.py", "tests/b.c"]
    assert "1 of 5 files are left out (tests/cases.jsonl)" in capsys.readouterr().err
    assert shards(tmp_path, "code", "**/*.{c,jsonl}") == ["tests/b.c"]
    assert shards(tmp_path, "text") == ["tests/cases.jsonl"]


@pytest.mark.parametrize("modality", ["text", "code", "video"])
@pytest.mark.parametrize("ending", [".gz", ".ZST", ".bz2", ".xz", ".zip", ".tgz", ".arrow"])
def test_what_cannot_be_read_is_refused_by_its_name(tmp_path, modality, ending):
    write_parquet(tmp_path / "a.parquet", numbered_rows(5))
    (tmp_path / f"b.jsonl{ending}").write_bytes(b"compressed")
    for pattern in ("", f"b.jsonl{ending}"):
        message = f"b.jsonl{ending}: {ending.lower()} files are not read; unpack it, or write"
        with pytest.raises(UserError, match=message):
            shards(tmp_path, modality, pattern)


def test_plain_text_with_zero_bytes_is_refused_with_its_place(tmp_path):
    (tmp_path / "a.txt").write_text("words\n" * 100_000)
    (tmp_path / "b.txt").write_bytes(b"words\n" * 100_000 + b"\0\n")
    config = DataConfig({"s": SourceConfig(path=str(tmp_path))})
    with pytest.raises(UserError, match="b.txt: a zero byte at byte 600000: not text in UTF-8"):
        index_sources(config, tmp_path / "storage")


def test_a_link_to_its_own_folder_and_a_second_name_double_nothing(tmp_path):
    folder = tmp_path / "shards"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / "0123").write_text("words")
    (folder / "train.txt").symlink_to("blobs/0123")
    (folder / "z.txt").write_text("words")
    (folder / "a-self").symlink_to(".")
    assert shards(folder, pattern="**/*.txt") == ["train.txt", "z.txt"]
    assert shards(folder) == ["train.txt", "z.txt"]


def test_a_broken_link_is_told(tmp_path):
    write_parquet(tmp_path / "a.parquet", numbered_rows(5))
    (tmp_path / "b.parquet").symlink_to("blobs/0123")
    (tmp_path / ".lock").symlink_to("nobody")
    with pytest.raises(UserError, match="^data.sources.s.path: .*/b.parquet is a broken link"):
        shards(tmp_path)
    assert shards(tmp_path, pattern="a*") == ["a.parquet"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("shard-{000008..000011}.txt", ["000008", "000009", "000010", "000011"]),
        ("shard-0000{08,1*}.txt", ["000008", "000010", "000011"]),
        ("{shard-{000008..9},x}-*.txt", []),
        ("shard-{000009..000009}.t*t", ["000009"]),
    ],
)
def test_braces_are_those_of_the_shell(tmp_path, pattern, expected):
    for number in range(8, 12):
        (tmp_path / f"shard-{number:06}.txt").write_text(f"{number:06}")
    if not expected:
        with pytest.raises(UserError, match="no file matches"):
            find_files("key", f"{tmp_path}/{pattern}")
        return
    for scheme in ("", "file://"):
        found = find_files("key", f"{scheme}{tmp_path}/{pattern}")
        assert [read_file(file.place).decode() for file in found] == expected


def test_a_file_that_braces_name_must_be_there(tmp_path):
    (tmp_path / "a-1.txt").write_text("words")
    with pytest.raises(UserError, match="^key: .*/a-2.txt does not exist"):
        find_files("key", f"{tmp_path}/a-{{1..2}}.txt")


def test_a_glob_of_folders_means_their_files(tmp_path):
    for name in ("lang=en/a.txt", "lang=en/more/b.txt", "lang=de/c.txt", "other/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert shards(tmp_path, pattern="lang=*") == [
        "lang=de/c.txt",
        "lang=en/a.txt",
        "lang=en/more/b.txt",
    ]
    (tmp_path / "lang=x").write_text("a file that matches is all that is meant")
    assert shards(tmp_path, pattern="lang=*") == ["lang=x"]


def test_a_pattern_that_is_none_is_told(tmp_path):
    with pytest.raises(UserError, match=r"^key: .*x\[z-a\]\* is no pattern .*; mend it"):
        find_files("key", f"{tmp_path}/x[z-a]*")
