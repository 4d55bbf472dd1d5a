"""Checkpoints: what is written comes back; a damaged folder is not a checkpoint."""

import pytest
import torch

from arbitor.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from arbitor.errors import UserError

STATE = {
    "a": torch.arange(6, dtype=torch.int8).view(2, 3),
    "b": torch.tensor([7], dtype=torch.int16),
}


def save(folder, step):
    return save_checkpoint(
        folder, STATE, step=step, config={"x": 1}, plan_fingerprint="f", conditions={"threads": 1}
    )


def test_round_trip(tmp_path):
    manifest, tensors = load_checkpoint(save(tmp_path, 5))
    assert (manifest.step, manifest.config, manifest.plan_fingerprint) == (5, {"x": 1}, "f")
    assert all(torch.equal(tensors[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, file, damage, capsys):
    older, newer = save(tmp_path, 5), save(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newer
    content = (newer / file).read_bytes()
    if damage == "remove":
        (newer / file).unlink()
    elif damage == "truncate":
        (newer / file).write_bytes(content[: len(content) // 2])
    else:
        (newer / file).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(UserError, match=file):
        load_checkpoint(newer)
    assert newest_checkpoint(tmp_path) == older
    assert "checkpoint passed over" in capsys.readouterr().out


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    (tmp_path / ".partial-step-00000001").mkdir()
    assert newest_checkpoint(tmp_path) is None
