"""How a run ends: with its data, and on a full disk."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

from arbitor.errors import UserError
from arbitor.settings import build
from ray_jobs import run as running
from ray_jobs.attempts import RunFailedError
from ray_jobs.config import Resume, RunConfig
from ray_jobs.journal import JournalReader
from ray_jobs.run import run, train_and_track
from tests.data_pipeline.shards import numbered_rows, write_jsonl

MODEL = {"width": 64, "num_layers": 1, "head_width": 32, "rotary_width": 16}
DATA = {"batch_size": 2, "sequence_length": 32, "slots_per_step": 6, "eval_slots": 2}


def small_run(storage, name, steps, **source):
    """A run on three shards of `storage/name-shards` that only a few steps fill."""
    folder = storage / f"{name}-shards"
    folder.mkdir(exist_ok=True)
    for i in range(3):
        if not (folder / f"{i}.jsonl").exists():
            write_jsonl(folder / f"{i}.jsonl", numbered_rows(12, f"s{i}r", largest=60))
    sources = {"text": {"path": str(folder)} | source}
    data = DATA | {"sources": sources}
    values = {"name": name, "storage": str(storage), "steps": steps, "data": data, "model": MODEL}
    return build(RunConfig, values), folder


def test_a_run_ends_with_its_data_and_goes_on_with_more_if_told_so(ray_head, tmp_path, capsys):
    config, folder = small_run(tmp_path, "ends", 1000, max_epochs=1, when_exhausted="stop")
    run(config)
    done = [record.step for record in JournalReader(config.folder).read()][-1]
    output = capsys.readouterr().out
    assert f"max_epochs is reached after step {done}; the run ends there" in output
    run(config)
    assert f"is finished: {done} steps" in capsys.readouterr().out

    (folder / "1.jsonl").unlink()
    write_jsonl(folder / "9.jsonl", numbered_rows(30, "s9r"))
    with pytest.raises(UserError) as caught:
        run(config)
    message = str(caught.value)
    assert f"text: removed {folder}/1.jsonl; text: added {folder}/9.jsonl" in message
    assert f"since step {done}" in message and "resume.allow_changed_data=true" in message

    run(replace(config, resume=Resume(allow_changed_data=True)))
    assert f"on after step {done} with changed data: text: removed" in capsys.readouterr().out
    noted = json.loads((config.folder / "data-changes.jsonl").read_text())
    assert noted["after_step"] == done and len(noted["changes"]) == 2
    steps = [record.step for record in JournalReader(config.folder).read()]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > done


def test_data_for_not_one_step_is_refused(tmp_path):
    config, _ = small_run(tmp_path, "tiny", 10, max_epochs=1)
    config = replace(config, data=replace(config.data, batch_size=4096))
    with pytest.raises(UserError, match="max_epochs leaves less data than one step needs"):
        run(config)


def test_a_full_disk_hides_no_cause_and_leaves_no_mlflow_run_open(tmp_path, monkeypatch, capsys):
    config, _ = small_run(tmp_path, "full", 10)
    config.folder.mkdir()
    ended = []

    @contextmanager
    def no_ray(config):
        yield

    class Sink:
        def __init__(self, config):
            self.finish = lambda *status: ended.extend(status)

    def fail(*_):
        raise RunFailedError("the cause")

    def find_no_room(_):
        raise OSError(28, "No space left on device")

    fakes = {"ray_cluster": no_ray, "Console": Sink, "Tracker": Sink, "train_on_ray": fail}
    for name, fake in (fakes | {"write_report": find_no_room}).items():
        monkeypatch.setattr(running, name, fake)
    with pytest.raises(RunFailedError, match="the cause"):
        train_and_track(config, {})
    assert ended == ["FAILED"]
    assert "report not written ([Errno 28] No space left" in capsys.readouterr().out
