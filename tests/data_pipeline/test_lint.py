"""lint on small real shards, with every fault in a known row: numbers and places exactly."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from arbitor.errors import UserError
from arbitor.settings import write_yaml
from data_pipeline import files
from data_pipeline.check import UNIT_BYTES
from data_pipeline.lint import lint_command
from tests.data_pipeline.media_shards import (
    media_rows,
    write_media_jsonl,
    write_media_parquet,
    write_tar,
)
from tests.data_pipeline.shards import numbered_rows, write_jsonl, write_parquet

ROOT = Path(__file__).parents[2]


def lint(capsys, *words):
    """(exit code, lines of each source by its name, the last line)"""
    code = lint_command([str(word) for word in words])
    *sources, last = capsys.readouterr().out.strip().split("\n\n")
    return code, {text.split(":")[0]: text.splitlines() for text in sources}, last


def figure(lines, name):
    (line,) = [line for line in lines if line.startswith(f"  {name}  ")]
    return line.removeprefix(f"  {name}").strip()


def test_clean_shards_of_all_modalities_are_told_apart(tmp_path, capsys):
    texts = numbered_rows(50)
    write_parquet(tmp_path / "a.parquet", texts)
    write_media_jsonl(tmp_path / "b.jsonl", media_rows("image", 12), "image")
    write_tar(tmp_path / "c.tar", media_rows("audio", 8), "audio")
    write_media_parquet(tmp_path / "d.parquet", media_rows("video", 6), "video")
    code, sources, last = lint(capsys, tmp_path)
    assert code == 0 and last == "clean: all 76 rows can be decoded"
    assert set(sources) == {"text", "image", "audio", "video"}

    assert sources["text"][0] == "text: 50 rows in 1 shards"
    num_bytes = sum(map(len, texts))
    assert figure(sources["text"], "bytes").startswith(f"{num_bytes:,} (")
    assert figure(sources["text"], "positions") == f"{num_bytes + 50:,}"
    assert figure(sources["text"], "columns") == "id int64, text string"

    # Images of 224 pixels have 196 patches, sound 50 frames a second, video 8 frames of 16 patches;
    # two borders and an end stand around them.
    captions = sum(len(f"n{n}.") for n in range(12))
    assert figure(sources["image"], "positions") == f"{12 * (196 + 3) + captions:,}"
    assert figure(sources["audio"], "seconds") == "1.0 (0.00 h)"  # 50, 100, 150, 200 ms, twice
    # 50 and 150 ms end within a frame of 20 ms.
    assert figure(sources["audio"], "positions") == str(2 * (3 + 5 + 8 + 10) + 8 * (2 + 3 + 1))
    assert figure(sources["video"], "seconds") == "6.0 (0.00 h)"  # 4 frames, 4 a second
    assert figure(sources["video"], "positions") == str(6 * (8 * 16 + 2 + 3 + 1))


def test_sizes_fall_into_powers_of_two(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", ["a", "bc", "def", "", "x" * 15, "y" * 16])
    _, sources, _ = lint(capsys, tmp_path)
    start = sources["text"].index("  bytes a row")
    histogram = [line.split("#")[0].split() for line in sources["text"][start + 1 : start + 6]]
    assert [(int(low), int(count)) for low, _, _, count in histogram] == [
        (1, 1),
        (2, 2),
        (4, 0),
        (8, 1),
        (16, 1),
    ]
    assert figure(sources["text"], "empty rows") == "1"


def bad_shards(folder):
    """Five sources with known faults; {(source, shard, row)} of them."""
    folder.mkdir()
    texts = numbered_rows(40)
    lines = [json.dumps({"text": text}) for text in texts]
    lines[7], lines[30] = '{"text": "torn', '{"body": "x"}'
    lines[3] = ""  # a blank line is no row
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    write_jsonl(folder / "code.jsonl", numbered_rows(20, "code"))

    images = media_rows("image", 24)
    images[5] = (images[5][0][:60], "cut")
    images[6] = (None, "null")
    images[20] = (b"no image", "")
    write_media_parquet(folder / "image.parquet", images, "image", group=4)
    sounds = media_rows("audio", 10)
    sounds[9] = (sounds[9][0][:-200], "cut")
    write_tar(folder / "audio.tar", sounds, "audio")
    films = media_rows("video", 6)
    films[0] = (b"", None)
    write_media_jsonl(folder / "video.jsonl", films, "video")
    rows = {"text": (6, 29), "image": (5, 6, 20), "audio": (9,), "video": (0,)}
    names = {path.stem: str(path) for path in folder.iterdir() if path.is_file()}
    return {(source, names[source], row) for source in rows for row in rows[source]}


def five_sources_yaml(folder, path):
    names = {"text": "jsonl", "code": "jsonl", "image": "parquet", "audio": "tar", "video": "jsonl"}
    sources = {
        name: {"modality": name, "path": f"{folder / name}.{ending}"}
        for name, ending in names.items()
    }
    sources["idle"] = {"modality": "text", "path": "nowhere", "weight": 0}
    path.write_text(write_yaml({"data": {"sources": sources}, "model": {"widht": 3}}))
    return path


def test_every_bad_row_is_found_with_its_shard_and_row(tmp_path, capsys):
    expected = bad_shards(tmp_path / "shards")
    config = five_sources_yaml(tmp_path / "shards", tmp_path / "run.yaml")
    out = tmp_path / "bad.jsonl"
    code, sources, last = lint(capsys, config, "--bad-rows", out)
    assert code == 1
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(entry["source"], entry["shard"], entry["row"]) for entry in found} == expected
    assert len(found) == len(expected) == 7
    reasons = {(entry["source"], entry["row"]): entry["reason"] for entry in found}
    assert reasons["text", 6].startswith("not valid JSON")
    assert reasons["text", 29] == "no key 'text', found body; set text_column"
    assert reasons["image", 6] == "image is null"
    assert reasons["image", 20] == "not a JPEG, PNG or WebP image"

    assert last.endswith("not clean: 7 bad rows of 99, 0 bad shards of 5")
    assert sources["text"][0] == "text: 39 rows in 1 shards"
    assert figure(sources["image"], "bad rows").startswith("3 (12.50%, above data.max_bad_fraction")
    assert f"    {tmp_path}/shards/image.parquet row 6: image is null" in sources["image"]
    assert figure(sources["code"], "bad rows") == "0"
    assert "data.sources.idle.weight=0.1 includes it" in sources["idle"][0]


def test_duplicates_are_found_across_shards_whatever_their_captions(tmp_path, capsys):
    images = media_rows("image", 12)
    write_media_parquet(tmp_path / "a.parquet", images, "image", group=4)
    again = [images[3], (images[0][0], "other words"), *media_rows("image", 2, 50), images[3]]
    write_media_parquet(tmp_path / "b.parquet", again, "image")
    _, sources, _ = lint(capsys, tmp_path)
    start = sources["image"].index("  duplicates  3")
    assert sources["image"][start + 1 : start + 4] == [
        "    b.parquet row 0 is a.parquet row 3",
        "    b.parquet row 1 is a.parquet row 0",
        "    b.parquet row 4 is a.parquet row 3",
    ]


def test_units_of_one_shard_are_put_together_in_order(tmp_path, capsys):
    rows = numbered_rows(3000, largest=8000)
    rows[2990] = rows[10]
    lines = [json.dumps({"text": row}) for row in rows]
    lines[2995] = "{"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    assert path.stat().st_size > 2 * UNIT_BYTES
    code, sources, _ = lint(capsys, path)
    assert code == 1 and sources["text"][0] == "text: 3,000 rows in 1 shards"
    assert "    a.jsonl row 2990 is a.jsonl row 10" in sources["text"]
    assert any(line.startswith(f"    {path} row 2995: ") for line in sources["text"])


def test_a_shard_that_cannot_be_read_is_told_and_the_others_are_checked(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", numbered_rows(20))
    write_parquet(tmp_path / "b.parquet", numbered_rows(20, "other"))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-9])
    write_parquet(tmp_path / "c.parquet", [1, 2, 3])
    code, sources, last = lint(capsys, tmp_path)
    assert code == 1 and last == "not clean: 0 bad rows of 20, 2 bad shards of 3"
    text = "\n".join(sources["text"])
    assert f"{tmp_path}/b.parquet: not a readable Parquet file" in text
    assert f"{tmp_path}/c.parquet: column 'text' has type int64, expected string" in text
    (tmp_path / "d.txt").write_bytes(b"\x7fELF\0\0\0")
    code, sources, last = lint(capsys, tmp_path / "d.txt")
    assert code == 1 and last == "not clean: 1 bad rows of 1, 0 bad shards of 1"
    assert f"    {tmp_path}/d.txt row 0: holds zero bytes: not text" in sources["text"]


def test_a_corrupt_row_group_is_all_bad_rows_and_later_rows_keep_their_numbers(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    write_parquet(path, numbered_rows(32))
    content = bytearray(path.read_bytes())
    place = content.index(b"row9 ")  # in the second of four groups of 8
    content[place - 40 : place + 200] = bytes(240)
    path.write_bytes(content)
    write_parquet(tmp_path / "b.parquet", numbered_rows(32)[31:])
    code, sources, _ = lint(capsys, tmp_path)
    assert code == 1 and sources["text"][0] == "text: 33 rows in 2 shards"
    assert any(f"{path} rows 8 to 15: row group 1 is corrupt" in line for line in sources["text"])
    assert "    b.parquet row 0 is a.parquet row 31" in sources["text"]


def test_one_file_that_is_missing_is_one_bad_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "RETRY_AFTER_S", (0,))
    path = tmp_path / "a.jsonl"
    write_media_jsonl(path, media_rows("image", 40), "image")
    (tmp_path / "files of a" / "7.png").unlink()
    monkeypatch.setattr("data_pipeline.lint.ProcessPoolExecutor", InThisProcess)
    code, sources, last = lint(capsys, path)
    assert code == 1 and last == "not clean: 1 bad rows of 40, 0 bad shards of 1"
    (line,) = [line for line in sources["image"] if " row 7: " in line]
    assert f"{tmp_path}/files of a/7.png: cannot be read" in line
    shutil.rmtree(tmp_path / "files of a")
    code, sources, last = lint(capsys, path)
    assert code == 1 and last == "not clean: 35 bad rows of 40, 0 bad shards of 1"
    assert any("rows 10 to 39: not looked at, after 5 rows" in line for line in sources["image"])


class InThisProcess(ThreadPoolExecutor):
    def __init__(self, count, context, initializer):
        super().__init__(count)


def test_of_text_a_run_refuses_what_is_bad(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", numbered_rows(999))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{")
    code, sources, _ = lint(capsys, tmp_path)
    expected = "1 (0.10%; a run refuses the shards of text that hold them)"
    assert code == 1 and figure(sources["text"], "bad rows") == expected


def test_large_row_groups_of_text_are_told(tmp_path, capsys, monkeypatch):
    write_parquet(tmp_path / "a.parquet", numbered_rows(50))
    assert not any("row groups" in line for line in lint(capsys, tmp_path)[1]["text"])
    monkeypatch.setattr("data_pipeline.lint_report.GROUP_BYTES", 500)
    said = figure(lint(capsys, tmp_path)[1]["text"], "row groups")
    assert said.startswith("up to ") and said.endswith("write smaller ones (row_group_size)")


def test_a_folder_of_hive_is_a_path(tmp_path, capsys, monkeypatch):
    (tmp_path / "lang=en").mkdir()
    write_jsonl(tmp_path / "lang=en" / "a.jsonl", numbered_rows(5))
    monkeypatch.chdir(tmp_path)
    for word in ("lang=en", "./lang=en", f"{tmp_path}/lang=en"):
        assert lint(capsys, word, "modality=code")[1]["code"][0] == "code: 5 rows in 1 shards"


def die(*words):
    os._exit(1)


@pytest.mark.parametrize("what", ["list_shard", "check_unit"])
def test_a_killed_process_is_told_with_its_shard(what, tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", numbered_rows(20))
    monkeypatch.setattr(f"data_pipeline.lint.{what}", die)
    with pytest.raises(UserError, match=f"^{tmp_path}/a.parquet: a process was killed"):
        lint_command([str(tmp_path)])


MISTAKES = {
    "no such path": (["{folder}/none"], "PATH: .*/none does not exist"),
    "two paths": (["{folder}", "{folder}"], "expected one CONFIG or PATH"),
    "a picture": (["{folder}/a.jpg"], "no shards in .*a.jpg; put image rows in .parquet"),
    "unknown modality": (["{folder}/a.txt", "modality=sound"], "^modality: unknown modality"),
    "unknown key": (["{folder}/a.txt", "modalty=text"], "^modalty: .*did you mean modality"),
    "compressed": (["{folder}/b.txt.gz"], "b.txt.gz: .gz files are not read; unpack it"),
    "no config": (["{folder}/none.yaml"], "none.yaml: cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_line(mistake, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt.gz").write_bytes(b"\x1f\x8b")
    words, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as error:
        lint_command([word.format(folder=tmp_path) for word in words])
    assert "\n" not in str(error.value)


def test_the_command_ends_with_its_exit_code(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n{')
    for name, code in (("a.jsonl", 1), ("none", 2)):
        command = [sys.executable, "-m", "data_pipeline.lint", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == code
        assert ("not clean: 1 bad rows of 2" in done.stdout) == (code == 1)
        assert len(done.stderr.splitlines()) == (code == 2)


def test_names_that_are_not_utf8_and_a_line_too_deep_are_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(os.fsdecode(b"\xff.py")))
    (tmp_path / "b.jsonl").write_text("[" * 100_000)
    command = [sys.executable, "-m", "data_pipeline.lint", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and not done.stderr
    assert "a.tar row 0: \\udcff.py: no .txt" in done.stdout
    assert "b.jsonl row 0: not valid JSON" in done.stdout
    Path(os.fsdecode(b"%b/\xff.jsonl" % bytes(tmp_path))).write_text("{}")
    with pytest.raises(UserError, match=r"^PATH: b'.*/\\xff.jsonl' is not named in UTF-8; rename"):
        lint_command([str(tmp_path)])
