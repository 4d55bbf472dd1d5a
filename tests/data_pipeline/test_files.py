"""Files here and at URIs: found by name, read in spite of faults, or given up with their name."""

import io

import pytest

from arbitor.errors import UserError
from data_pipeline import files
from data_pipeline.files import PatientFile, ShardError, beside, find_files, read_file
from tests.data_pipeline.flaky import flaky_files

NAMES = ["b.txt", "a b#1?.txt", "sub/\N{SNOWMAN} é%20.txt", "sub/deep/[x].txt", ".hidden", "c.csv"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / ".git").mkdir()
    for name in [*NAMES, "sub/.git/config"]:
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", [0, 1, 2, 3, 5]),
        ("*.txt", [0, 1]),
        ("**/*.txt", [0, 1, 2, 3]),
        ("sub/*/*", [3]),
        ("[bc].*", [0, 5]),
        ("[!b].csv", [5]),
        ("sub/deep/[x].txt", [3]),
        ("c.csv", [5]),
    ],
)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_files_are_found_and_read_by_any_name(folder, scheme, pattern, expected):
    found = find_files("key", f"{scheme}{folder}/{pattern}".rstrip("/"))
    assert [read_file(file.place).decode() for file in found] == sorted(NAMES[i] for i in expected)
    for file in found:
        assert file.place.startswith(scheme + "/") and file.version
        assert file.size == len(read_file(file.place))


def test_a_question_mark_is_magic_but_in_a_uri(folder):
    assert [file.place for file in find_files("key", f"{folder}/?.txt")] == [f"{folder}/b.txt"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_path_in_a_row_is_beside_its_shard(folder, scheme):
    shard = find_files("key", f"{scheme}{folder}/b.txt")[0].place
    assert read_file(beside(shard, "a b#1?.txt")) == b"a b#1?.txt"
    assert beside(shard, "s3://bucket/x") == "s3://bucket/x"


def test_what_is_not_there_is_told(folder):
    for place, message in (
        (f"{folder}/none", "does not exist"),
        (f"{folder}/none*", "no file matches"),
        (f"{folder}/empty.txt", "is empty"),
        ("smb://host/share", "cannot be listed .*; give a path or a URI"),
        (f"file://{folder}/none", "does not exist"),
    ):
        with pytest.raises(UserError, match=f"key: .*{message}"):
            find_files("key", place)


def test_reading_in_pieces_through_faults(folder):
    content = bytes(range(256)) * 400
    (folder / "large").write_bytes(content)
    with flaky_files() as flaky:
        before = flaky.failures
        with PatientFile(str(folder / "large")) as file:
            assert file.seek(-10, io.SEEK_END) == len(content) - 10
            assert file.read(100) == content[-10:] and file.read() == b""
            file.seek(5)
            pieces = [file.read(1000) for _ in range(200)]
            assert b"".join(pieces) == content[5:]
        with io.BufferedReader(PatientFile(str(folder / "large")), 777) as file:
            assert b"".join(file) == content
        assert flaky.failures - before > 30


def test_patience_ends(folder, monkeypatch):
    pauses = []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    file = PatientFile(str(folder / "b.txt"))
    (folder / "b.txt").write_text("")
    with pytest.raises(ShardError, match="b.txt: cannot be read .*tried 4 times"):
        file.read()
    (folder / "b.txt").unlink()
    with pytest.raises(ShardError, match="b.txt: cannot be read .*b.txt.*; restore it"):
        PatientFile(str(folder / "b.txt"))
    assert pauses == [0.2, 1.0, 3.0] * 2
