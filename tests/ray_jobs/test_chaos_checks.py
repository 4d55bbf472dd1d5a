"""What `python -m benchmarks.chaos` looks at is seen to differ where it differs."""

import json
from dataclasses import replace

import pytest
import torch

from arbitor.checkpoint import CHECKPOINTS, save_checkpoint
from arbitor.settings import build
from benchmarks.chaos_checks import (
    compare_checkpoints,
    compare_journals,
    compare_rows,
    compare_so_far,
)
from ray_jobs.config import RunConfig
from ray_jobs.journal import Journal

VALUES = {
    "name": "calm",
    "steps": 3,
    "data": {"slots_per_step": 2, "sources": {"text": {"path": "sample://text"}}},
}
SLOTS = [(step, slot) for step in range(3) for slot in range(2)]


@pytest.fixture
def runs(tmp_path):
    """Two runs that agree; the second did its last step twice and left half a line."""
    calm = replace(build(RunConfig, VALUES), storage=str(tmp_path))
    wild = replace(calm, name="wild")
    for config in (calm, wild):
        save(config, torch.arange(4))
        journal = Journal(config.folder)
        for step in (1, 2, 3):
            journal.append(step, {"loss/total": step / 3, "throughput/workers": 1})
        journal.close()
    log(calm, SLOTS)
    log(wild, [*SLOTS, *SLOTS[-2:]])
    with open(wild.folder / "slots-0.jsonl", "a") as file:
        file.write('{"step": 2, "sl')
    return calm, wild


def save(config, tensor):
    header = {"step": 3, "config": {}, "plan_fingerprint": "f", "conditions": {}}
    config.folder.mkdir(exist_ok=True)
    save_checkpoint(config.folder / CHECKPOINTS, {"a": tensor}, **header)


def log(config, places, row=7):
    with open(config.folder / "slots-0.jsonl", "w") as file:
        for step, slot in places:
            entry = {"step": step, "slot": slot, "source": "text"}
            file.write(json.dumps(entry | {"row_ids": [row], "sha256": "x"}) + "\n")


def faults_of(compare, *runs):
    faults = []
    return compare(*runs, faults), faults


def test_runs_that_agree_have_no_faults(runs):
    assert faults_of(compare_checkpoints, *runs) == (1, [])
    assert faults_of(compare_rows, *runs) == ((6, 8, 2, 1), [])
    assert faults_of(compare_journals, *runs) == (3, [])


def test_other_bits_rows_and_losses_are_faults(runs):
    calm, wild = runs
    other = replace(calm, name="other")
    save(other, torch.arange(4).flip(0))
    assert "1 tensors differ, a" in faults_of(compare_checkpoints, calm, other)[1][0]
    log(wild, SLOTS[1:])
    assert faults_of(compare_rows, *runs)[1] == ["1 slots were never consumed, (0, 0) among them"]
    log(wild, SLOTS, row=8)
    assert "6 slots had other rows" in faults_of(compare_rows, *runs)[1][0]
    journal = wild.folder / "metrics.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2] + lines[1:]))
    assert "each step once" in faults_of(compare_journals, *runs)[1][0]
    journal.write_text("".join(lines).replace('"loss/total": 1.0', '"loss/total": 1.1'))
    assert faults_of(compare_journals, *runs)[1] == ["1 steps have other losses, step 3 the first"]


def test_a_run_that_has_not_ended_is_compared_as_far_as_it_is(runs):
    calm, wild = runs
    log(wild, SLOTS[:3])
    journal = wild.folder / "metrics.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:2]))
    assert compare_so_far(calm, wild) == []
    log(wild, SLOTS[:3], row=8)
    journal.write_text("".join([*lines[:2], lines[1]]))
    rows, steps, *_ = compare_so_far(calm, wild)
    assert "3 slots had other rows" in rows and "each step once" in steps
