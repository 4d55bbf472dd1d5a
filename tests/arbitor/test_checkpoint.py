"""Checkpoints: what is written comes back; a damaged folder is not a checkpoint."""

import errno
import itertools
import json
import resource
import subprocess
import sys

import pytest
import torch

from arbitor import checkpoint
from arbitor.checkpoint import (
    CheckpointWriter,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from arbitor.errors import UserError
from arbitor.owners import SupersededError, add_owner

STATE = {
    "a": torch.arange(6, dtype=torch.int8).view(2, 3),
    "b": torch.tensor([7], dtype=torch.int16),
}


def save(folder, step, token=0):
    return save_checkpoint(
        folder,
        STATE,
        step=step,
        config={"x": 1},
        plan_fingerprint="f",
        conditions={"threads": 1},
        token=token,
    )


def test_round_trip(tmp_path):
    manifest, tensors = load_checkpoint(save(tmp_path, 5))
    assert (manifest.step, manifest.config, manifest.plan_fingerprint) == (5, {"x": 1}, "f")
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)


FILES = ["model.safetensors", "manifest.json"]


def damages(content, damage):
    """All ways to flip one bit of a file's content, or to cut it."""
    if damage == "truncate":
        return [content[:length] for length in range(len(content))]
    flipped = []
    for position, bit in itertools.product(range(len(content)), range(8)):
        byte = bytes([content[position] ^ 1 << bit])
        flipped.append(content[:position] + byte + content[position + 1 :])
    return flipped


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file, damage, capsys):
    older, newer = save(tmp_path, 5), save(tmp_path, 10)
    path = newer / file
    content = path.read_bytes()
    for damaged in damages(content, damage):
        path.write_bytes(damaged)
        assert newest_checkpoint(tmp_path) == older, damaged
    assert "checkpoint passed over" in capsys.readouterr().out
    with pytest.raises(UserError, match=file):
        load_checkpoint(newer)
    path.write_bytes(content)
    assert newest_checkpoint(tmp_path) == newer


def test_the_newest_undamaged_checkpoint_is_taken_whatever_is_missing(tmp_path):
    folders = [save(tmp_path, step) for step in (5, 10, 15, 20)]
    (folders[3] / FILES[0]).unlink()
    (folders[2] / FILES[1]).unlink()
    assert newest_checkpoint(tmp_path) == folders[1]
    with pytest.raises(UserError, match=FILES[0]):
        load_checkpoint(folders[3])
    for file in FILES:
        (folders[1] / file).write_bytes((folders[0] / file).read_bytes() + b" ")
    assert newest_checkpoint(tmp_path) == folders[0]


def test_a_writer_killed_at_random_instants_loses_no_checkpoint_that_it_told():
    """`python -m benchmarks.checkpoint_chaos` is the long form."""
    command = [sys.executable, "-m", "benchmarks.checkpoint_chaos", "--kills", "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] == 30 and counts["kills_inside_a_checkpoint"] > 5


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    (tmp_path / ".partial-step-00000001").mkdir()
    assert newest_checkpoint(tmp_path) is None


def header(step):
    return {"step": step, "config": {}, "plan_fingerprint": "f", "conditions": {}}


def test_the_writer_keeps_the_newest_and_writes_what_was_given_to_it(tmp_path):
    (tmp_path / ".partial-step-00000001").mkdir()
    writer = CheckpointWriter(tmp_path, keep=2)
    state = {"a": torch.zeros(3, dtype=torch.int8)}
    for step in (1, 2, 3):
        outcome = writer.save(state, **header(step))
        assert outcome is None if step == 1 else (outcome.step, outcome.error) == (step - 1, "")
        state["a"] += 1  # training goes on while the thread writes
    assert (writer.wait().step, writer.poll()) == (3, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    _, tensors = load_checkpoint(newest_checkpoint(tmp_path))
    assert tensors["a"].tolist() == [2, 2, 2]


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(STATE, **header(1))

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    assert writer.wait().error == ""
    monkeypatch.setattr(checkpoint, "save_file", full)
    writer.save(STATE, **header(2))
    assert "No space left" in writer.wait().error
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    monkeypatch.undo()
    writer.save(STATE, **header(2))
    assert writer.wait().error == "" and newest_checkpoint(tmp_path).name == "step-00000002"


def test_a_whole_checkpoint_of_the_same_step_stays_and_a_damaged_one_is_replaced(tmp_path):
    folder = save(tmp_path, 5)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert save(tmp_path, 5) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    (folder / "model.safetensors").write_bytes(b"")
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 5)
    assert newest_checkpoint(tmp_path) == folder


def test_a_manifest_that_was_edited_is_refused(tmp_path):
    folder = save(tmp_path, 5)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"step": 5', '"step": 6'))
    with pytest.raises(UserError, match="manifest.json: damaged"):
        load_checkpoint(folder)


def test_a_checkpoint_of_an_owner_that_lost_the_run_is_not_chosen(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    first = add_owner(tmp_path, None, "workers", 0, {})
    older = save(folder, 5, token=first.token)
    second = add_owner(tmp_path, first, "workers", 5, {})
    with pytest.raises(SupersededError):
        save(folder, 10, token=first.token)
    assert newest_checkpoint(folder) == older
    (tmp_path / "owners" / "00000002.json").rename(tmp_path / "away")  # not seen in time
    late = save(folder, 10, token=first.token)
    (tmp_path / "away").rename(tmp_path / "owners" / "00000002.json")
    assert newest_checkpoint(folder) == older
    assert "written by owner 1, which had lost the run" in capsys.readouterr().out
    assert save(folder, 10, token=second.token) == late
    assert load_checkpoint(newest_checkpoint(folder))[0].token == second.token


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path):
    """The kernel refuses to write beyond a size, in the middle of the file."""
    save(tmp_path, 1)
    big = {"a": torch.zeros(1 << 16, dtype=torch.int8)}
    writer = CheckpointWriter(tmp_path, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        writer.save(big, **header(2))
        outcome = writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in outcome.error
    assert newest_checkpoint(tmp_path).name == "step-00000001"
    writer.save(big, **header(2))
    assert writer.wait().error == "" and newest_checkpoint(tmp_path).name == "step-00000002"
