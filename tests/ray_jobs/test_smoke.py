"""What smoke checks, on a run of a second and on what is done to its records."""

import json
from dataclasses import replace

import pytest

from arbitor.errors import UserError
from arbitor.settings import build
from ray_jobs import smoke
from ray_jobs.config import RunConfig, load_run_config
from ray_jobs.journal import JournalReader, Record, Start
from ray_jobs.run import run

SMALL = {
    "name": "small",
    "steps": 6,
    "eval_interval": 0,
    "save_interval": 3,
    "log_slots": True,
    "model": {"width": 64, "num_layers": 1},
    "data": {
        "batch_size": 1,
        "sequence_length": 16,
        "slots_per_step": 3,
        "sources": {
            "text": {"path": "sample://text", "weight": 0.75},
            "code": {"path": "sample://code", "modality": "code", "weight": 0.25},
        },
    },
    "scaling": {"threads_per_worker": 1},
}


@pytest.fixture(scope="module")
def finished(ray_head, tmp_path_factory):
    config = build(RunConfig, SMALL | {"storage": str(tmp_path_factory.mktemp("runs"))})
    run(config)
    return config, list(JournalReader(config.folder).read())


class Killer:
    has_killed = True


def test_a_run_as_promised_has_no_faults(finished):
    config, records = finished
    assert smoke.one_point_a_step(config, records) == []
    assert smoke.mix_as_asked(config, records[-1]) == []
    assert smoke.rows_as_planned(config) == []


def test_each_broken_promise_is_named(finished):
    config, records = finished
    (fault,) = smoke.one_point_a_step(config, [*records[:-1], records[0]])
    assert fault == "points: the journal has not every step once"
    shares = records[-1].metrics
    two_slots = 2 / (config.steps * config.data.slots_per_step)
    tilted = shares | {"mix/realised/code": shares["mix/realised/code"] + two_slots}
    (fault,) = smoke.mix_as_asked(config, replace(records[-1], metrics=tilted))
    assert fault.startswith("mix: code has ")

    path = config.folder / "slots-0.jsonl"
    logged = path.read_text()
    slots = [json.loads(line) for line in logged.splitlines()]
    slots[4]["row_ids"][0] += 1  # another row
    path.write_text("".join(json.dumps(slot) + "\n" for slot in slots[:-1]))  # and one left out
    try:
        assert smoke.rows_as_planned(config) == ["rows: 1 slots are not the plan's, 1 are missing"]
    finally:
        path.write_text(logged)


def test_a_restart_without_a_replayed_step_is_a_fault():
    starts = [Start(0.0, after, "worker", 1, "here") for after in (0, 3)]
    steps = [Record(step, float(step), {}) for step in range(1, 7)]
    assert smoke.killed_and_replayed([starts[0], *steps[:5], starts[1], steps[5]], Killer) == []
    exact = smoke.killed_and_replayed([starts[0], *steps[:3], starts[1], *steps[3:]], Killer)
    assert exact == smoke.killed_and_replayed([starts[0], *steps], Killer)
    assert exact == ["restart: no step was replayed"]
    not_killed = type("Killer", (), {"has_killed": False})
    assert smoke.killed_and_replayed([starts[0], *steps], not_killed) != []


def test_steps_to_kill_at_lie_between_checkpoints():
    config = load_run_config("smoke", [str(smoke.SMOKE_YAML)], {}, "")
    steps = smoke.kill_steps(config)
    assert min(steps) > config.save_interval and max(steps) < config.steps - 1
    assert all(step % config.save_interval for step in steps)
    for words in (["--no-save"], ["--save-interval", "60"]):
        with pytest.raises(UserError, match="save_interval"):
            smoke.kill_steps(load_run_config("smoke", [str(smoke.SMOKE_YAML), *words], {}, ""))
