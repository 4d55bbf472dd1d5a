"""Whole runs on a real Ray: same bits for any number of workers, exact slots, MLflow, resume."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from mlflow.tracking import MlflowClient
from PIL import Image

from arbitor.audio_codec import HOP
from arbitor.checkpoint import CHECKPOINTS, MANIFEST, load_checkpoint, newest_checkpoint
from arbitor.errors import UserError
from arbitor.main import ARBModel
from arbitor.settings import build, write_yaml
from data_pipeline.contact_sheet import MARGIN
from data_pipeline.run_data import read_slots
from ray_jobs.config import RunConfig
from ray_jobs.construction import with_needed_parts
from ray_jobs.journal import JournalReader
from ray_jobs.run import run
from ray_jobs.slots import logged_slots
from ray_jobs.worker import open_run_data

STEPS = 20
VALUES = {
    "steps": STEPS,
    "log_interval": 5,
    "eval_interval": 10,
    "save_interval": 5,
    "keep_checkpoints": 4,
    "log_slots": True,
    "model": {"width": 64, "num_layers": 1, "head_width": 32, "rotary_width": 16},
    "update": {"warmup_steps": 5},
    "data": {
        "batch_size": 2,
        "sequence_length": 32,
        "slots_per_step": 6,
        "eval_slots": 2,
        "image": {"size": 16, "patch": 8, "sequence_length": 32},
        "audio": {"seconds_max": 0.3, "sequence_length": 32},
        "video": {"size": 8, "patch": 8, "num_frames": 2, "sequence_length": 32},
        "sources": {
            "text": {"path": "sample://text", "weight": 0.6},
            "code": {"path": "sample://code", "modality": "code", "weight": [[0, 0.2], [20, 0.6]]},
            "image": {"path": "sample://image", "modality": "image", "weight": 0.3},
            "audio": {"path": "sample://audio", "modality": "audio", "weight": 0.2},
            "video": {"path": "sample://video", "modality": "video", "weight": 0.3},
        },
    },
    "scaling": {"threads_per_worker": 1},
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def make_config(storage, name, profile=False, **scaling):
    values = VALUES | {"name": name, "storage": str(storage), "profile": profile}
    parts = ("attention", "vq", "graph", "moe", "act", "output_router")
    model = {f"enable_{part}": True for part in parts}
    model |= {"codebook_size": 64, "attention_window": 8, "hca_stride": 4}
    values["model"] = values["model"] | model
    return build(RunConfig, values | {"scaling": VALUES["scaling"] | scaling})


@pytest.fixture(scope="module")
def one_worker(ray_head, storage):
    config = replace(make_config(storage, "one"), sample_interval=10)  # of the runs here, only it
    run(config)
    return config


@pytest.fixture(scope="module")
def two_workers(ray_head, storage):
    config = make_config(storage, "two", num_workers=2)
    run(config)
    return config


def final_tensors(config):
    manifest, tensors = load_checkpoint(newest_checkpoint(config.folder / CHECKPOINTS))
    assert manifest.step == config.steps
    return tensors


def hashes(tensors):
    return {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in tensors.items()}


def test_one_and_two_workers_end_with_the_same_bits(one_worker, two_workers):
    one, two = hashes(final_tensors(one_worker)), hashes(final_tensors(two_workers))
    assert one == two
    model = with_needed_parts(one_worker).model
    start = hashes(ARBModel(model, one_worker.seed).state_dict())
    assert all(one[name] != start[name] for name in one if name.endswith(".latent"))


@pytest.mark.slow
def test_the_same_run_again_ends_with_the_same_bits_profiled_or_not(one_worker, storage, capsys):
    again = make_config(storage, "again", profile=True)
    run(again)
    assert hashes(final_tensors(again)) == hashes(final_tensors(one_worker))
    table = (again.folder / "profile.txt").read_text()
    assert table.startswith("step 6\n") and "aten::mm" in table
    assert f"profile:    {again.folder / 'profile.txt'}" in capsys.readouterr().out


def check_samples(stem):
    """The files of a step are what they say."""
    assert Path(f"{stem}.txt").read_text().startswith("--- 1\n")
    captions = Path(f"{stem}-captions.txt").read_text().splitlines()
    assert all(line.startswith("a ") for line in captions[::2]), "those of held-out rows"
    assert all(line.startswith("-> ") for line in captions[1::2])
    # Four pictures of 16 pixels, enlarged to 96, two a line, above their captions.
    sheet = np.asarray(Image.open(f"{stem}-image.png"))
    assert sheet.shape[1] == 2 * 96 + 3 * MARGIN
    assert sheet[MARGIN : MARGIN + 96, MARGIN : MARGIN + 96].std() > 0
    assert soundfile.info(f"{stem}-audio-1.wav").frames % HOP == 0
    with av.open(f"{stem}-video-1.mp4") as container:
        assert len(list(container.decode(video=0))) == 2


def test_losses_do_not_depend_on_the_number_of_workers(one_worker, two_workers):
    def metrics(config):
        # Speed, and the captions that the first worker cut, are its own.
        own = ("throughput/", "checkpoint/", "system/", "data/truncated_captions/")
        return [
            {key: v for key, v in record.metrics.items() if not key.startswith(own)}
            for record in JournalReader(config.folder).read()
        ]

    assert metrics(one_worker) == metrics(two_workers)


@pytest.mark.parametrize("workers", ["one_worker", "two_workers"])
def test_every_slot_is_computed_once_and_its_rows_are_the_plans(workers, request):
    config = request.getfixturevalue(workers)
    logged, _ = logged_slots(config.folder)
    for rank, slots in logged.items():
        assert all(slot["slot"] % len(logged) == rank for slot in slots)
    seen = sorted(
        (s for slots in logged.values() for s in slots), key=lambda s: (s["step"], s["slot"])
    )
    expected = [
        {
            "step": slot.step,
            "slot": slot.slot,
            "source": slot.source,
            "row_ids": slot.row_ids.tolist(),
            "sha256": slot.sha256,
        }
        for slot in read_slots(open_run_data(config), 0, STEPS, 0, 1)
    ]
    assert seen == expected
    assert len(seen) == STEPS * config.data.slots_per_step


def test_mlflow_has_one_run_with_one_point_a_step(one_worker, storage):
    note = json.loads((one_worker.folder / "mlflow.json").read_text())
    client = MlflowClient(note["tracking_uri"])
    run_info = client.get_run(note["run_id"])
    assert run_info.info.status == "FINISHED"
    assert run_info.data.params["model.width"] == "64"
    assert run_info.data.params["data.sources.code.weight"] == "[[0.0, 0.2], [20.0, 0.6]]"
    plan = open_run_data(one_worker).plan
    for source in VALUES["data"]["sources"]:
        served = [s + 1 for s in range(STEPS) if any(p.source == source for p in plan.step(s))]
        history = client.get_metric_history(note["run_id"], f"loss/{source}")
        assert [point.step for point in history] == served
    totals = client.get_metric_history(note["run_id"], "loss/total")
    assert [point.step for point in totals] == list(range(1, STEPS + 1))
    assert totals[-1].value < totals[0].value
    samples = [f.path for f in client.list_artifacts(note["run_id"], "samples")]
    kinds = ("-audio-0.wav", "-audio-1.wav", "-captions.txt", "-image.png")
    kinds = (*kinds, "-video-0.mp4", "-video-1.mp4", ".txt")
    assert samples == [f"samples/step-{s:08}{kind}" for s in (10, 20) for kind in kinds]
    check_samples(one_worker.folder / "samples" / "step-00000020")
    routed = client.get_metric_history(note["run_id"], "parts/image/router_accuracy")
    assert len(routed) > STEPS / 2
    assert "parts/text/router_accuracy" not in run_info.data.metrics
    validation = client.get_metric_history(note["run_id"], "validation/text")
    assert [point.step for point in validation] == [10, 20]


def test_evaluation_of_a_run_repeats_its_own(one_worker):
    newest = newest_checkpoint(one_worker.folder / CHECKPOINTS)
    (*_, last) = JournalReader(one_worker.folder).read()
    for path in (one_worker.folder, newest):
        command = [sys.executable, "-m", "ray_jobs.evaluate", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert f"{newest}: step 20" in done.stdout
        for source in ("text", "code"):
            loss = last.metrics[f"validation/{source}"]
            assert f"{source}: {loss:.4f} nats per symbol" in done.stdout
    done = subprocess.run([*command[:-1], "/"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "give a run's folder" in done.stderr


def test_a_finished_run_says_so_and_changes_nothing(one_worker, capsys):
    before = {p: p.stat().st_mtime_ns for p in one_worker.folder.rglob("*") if p.is_file()}
    run(one_worker)
    assert "is finished: 20 steps" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in one_worker.folder.rglob("*") if p.is_file()}
    assert before == after


def test_another_configuration_under_the_same_name_is_refused(one_worker):
    with pytest.raises(UserError, match=r"another configuration \(seed 0 -> 1\)"):
        run(replace(one_worker, seed=1))


def go_on_after(config, step, **scaling):
    """Takes the checkpoints after `step` away and runs to the end, on other workers."""
    for folder in (config.folder / CHECKPOINTS).glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            (folder / MANIFEST).unlink()
    for log in config.folder.glob("slots-*.jsonl"):
        log.unlink()
    run(replace(config, scaling=replace(config.scaling, **scaling)))


def test_an_unfinished_run_resumes_on_other_workers_to_the_same_bits(
    two_workers, one_worker, capsys
):
    """2 -> 3 workers, with half of each of Ray's own files; `-m slow` has more of them."""
    ray_files = [path for path in (two_workers.folder / "ray").rglob("*") if path.is_file()]
    assert ray_files
    for path in ray_files:
        os.truncate(path, path.stat().st_size // 2)
    go_on_after(two_workers, 15, num_workers=3)
    assert "resuming after step 15; steps 16 to 20 are in the journal" in capsys.readouterr().out
    assert hashes(final_tensors(two_workers)) == hashes(final_tensors(one_worker))
    logged, _ = logged_slots(two_workers.folder)
    replayed = {rank: [(s["step"], s["slot"]) for s in slots] for rank, slots in logged.items()}
    assert replayed == {
        rank: [(step, slot) for step in range(15, 20) for slot in (rank, rank + 3)]
        for rank in range(3)
    }
    steps = [record.step for record in JournalReader(two_workers.folder).read()]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_run_that_grows_and_shrinks_ends_with_the_bits_of_one_worker(one_worker, storage):
    """1 -> 2 -> 3 -> 4 -> 2 -> 1 workers, each from a checkpoint of those before."""
    config = make_config(storage, "resized")
    shutil.copytree(one_worker.folder, config.folder)
    (config.folder / "config.yaml").write_text(write_yaml(config.values()))
    (config.folder / "mlflow.json").unlink()
    expected = hashes(final_tensors(one_worker))
    for step, workers in ((5, 2), (10, 3), (10, 4), (15, 2), (15, 1)):
        go_on_after(config, step, num_workers=workers)
        assert len(logged_slots(config.folder)[0]) == workers
        assert hashes(final_tensors(config)) == expected, workers


def test_a_run_begins_with_the_weights_of_another(ray_head, one_worker, storage, capsys):
    """With rates of 0 nothing moves: the new run ends with the weights that it began with."""
    frozen = replace(one_worker.update, latent_rate=0.0, scale_rate=0.0)
    config = replace(
        one_worker,
        name="begun",
        steps=2,
        eval_interval=0,
        update=frozen,
        sample_interval=0,
        init_from=str(one_worker.folder),
    )
    newest = newest_checkpoint(one_worker.folder / CHECKPOINTS)
    run(config)
    assert f"begins with the weights of {newest}" in capsys.readouterr().out
    records = list(JournalReader(config.folder).read())
    assert [record.step for record in records] == [1, 2]
    assert "throughput/validation_s" not in records[-1].metrics  # eval_interval=0: never
    manifest, tensors = load_checkpoint(newest_checkpoint(config.folder / CHECKPOINTS))
    assert manifest.step == 2 and manifest.config["init_from"] == str(newest)
    first = final_tensors(one_worker)
    latents = [name for name in first if name.endswith(".latent") and "codebook" not in name]
    assert latents and all(tensors[name].equal(first[name]) for name in latents)
    run(config)  # the same command again
    assert "is finished" in capsys.readouterr().out

    wider = replace(config, name="wider", model=replace(config.model, width=128))
    with pytest.raises(UserError) as caught:
        run(wider)
    assert re.search(r"\.latent is \[\d+, 64\] instead of \[\d+, 128\]", str(caught.value))
    with pytest.raises(UserError, match="no whole checkpoint"):
        run(replace(config, name="none", init_from=str(storage)))
