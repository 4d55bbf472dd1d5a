"""The copy of a run in an object store: what is sent when, and a run that goes on from it."""

import json
import shutil
import time
from dataclasses import replace

import pytest

from arbitor.checkpoint import CHECKPOINTS, MANIFEST, TENSORS, load_checkpoint, newest_checkpoint
from arbitor.errors import UserError
from arbitor.settings import build
from ray_jobs import mirror
from ray_jobs.config import CONFIG, RunConfig
from ray_jobs.journal import JournalReader
from ray_jobs.mirror import Mirror, fetch
from ray_jobs.run import run, say_finished
from ray_jobs.tracking import MLFLOW_FILE, tracking_uri
from tests.data_pipeline.shards import numbered_rows, write_jsonl

MODEL = {"width": 64, "num_layers": 1}


def make_config(tmp_path, place, steps=4):
    values = {
        "name": "a run",
        "storage": str(tmp_path / "runs"),
        "mirror": place,
        "steps": steps,
        "save_interval": 2,
        "model": MODEL,
        "data": {
            "batch_size": 2,
            "sequence_length": 32,
            "sources": {"text": {"path": str(tmp_path / "rows.jsonl")}},
        },
    }
    return build(RunConfig, values)


def test_a_run_goes_on_from_the_store_when_its_disk_is_lost(ray_head, bucket, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", numbered_rows(200))
    config = make_config(tmp_path, "s3://shards/runs")
    run(config)
    before = list(JournalReader(config.folder).read())
    newest = load_checkpoint(newest_checkpoint(config.folder / CHECKPOINTS))[1]
    shutil.rmtree(tmp_path / "runs")
    fetch(config)
    fetched = load_checkpoint(newest_checkpoint(config.folder / CHECKPOINTS))[1]
    assert all(fetched[name].equal(tensor) for name, tensor in newest.items())
    shutil.rmtree(tmp_path / "runs")
    run(make_config(tmp_path, "s3://shards/runs", steps=6))
    told = capsys.readouterr().out
    assert "mirror: fetching a run from s3://shards/runs" in told and "after step 4" in told
    records = list(JournalReader(config.folder).read())
    assert records[:4] == before and [record.step for record in records] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(mirror, "_LOOK_EVERY_S", 0.02)


def begin_run(config):
    config.folder.mkdir(parents=True)
    (config.folder / CONFIG).write_text("name: a run\n")


def add_checkpoint(config, step):
    folder = config.folder / CHECKPOINTS / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / TENSORS).write_bytes(b"tensors")
    (folder / MANIFEST).write_text(json.dumps({"step": step}))
    return folder


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_checkpoint_is_sent_with_all_else_and_dropped_where_it_is_dropped(quick, tmp_path):
    config = make_config(tmp_path, f"file://{tmp_path}/store")
    begin_run(config)
    store = tmp_path / "store" / "a run"
    sender = Mirror(config)
    first = add_checkpoint(config, 1)
    wait_for((store / CHECKPOINTS / first.name / MANIFEST).exists)
    assert (store / CHECKPOINTS / first.name / TENSORS).read_bytes() == b"tensors"
    assert (store / CONFIG).read_text() == "name: a run\n"
    second = add_checkpoint(config, 2)
    shutil.rmtree(first)
    wait_for((store / CHECKPOINTS / second.name / MANIFEST).exists)
    wait_for(lambda: not list((store / CHECKPOINTS / first.name).glob("*")))
    (config.folder / "report.html").write_text("the end")
    (config.folder / "heartbeats").mkdir()
    (config.folder / "heartbeats" / "0").write_text("{}")
    sender.close()
    assert (store / "report.html").read_text() == "the end"
    assert not (store / "heartbeats").exists()


def test_the_manifest_is_sent_last_and_dropped_first(quick, tmp_path, monkeypatch):
    config = make_config(tmp_path, f"file://{tmp_path}/store")
    begin_run(config)
    add_checkpoint(config, 1)
    order = []

    class Store(mirror.fs.LocalFileSystem):
        def delete_file(self, path):
            order.append(path.rpartition("/")[2])
            super().delete_file(path)

    copy, where = mirror.fs.copy_files, str(tmp_path / "store")
    monkeypatch.setattr(mirror, "_open", lambda config: (Store(), where))
    monkeypatch.setattr(
        mirror.fs,
        "copy_files",
        lambda a, *b, **k: (order.append(a.rpartition("/")[2]), copy(a, *b, **k)),
    )
    Mirror(config).close()
    assert order == [TENSORS, CONFIG, MANIFEST] or order == [CONFIG, TENSORS, MANIFEST]
    order.clear()
    shutil.rmtree(config.folder / CHECKPOINTS)
    add_checkpoint(config, 2)
    Mirror(config).close()
    assert order[-2:] == [MANIFEST, TENSORS]


def test_a_disk_that_is_lost_under_the_run_takes_nothing_from_the_store(quick, tmp_path):
    config = make_config(tmp_path, f"file://{tmp_path}/store")
    begin_run(config)
    add_checkpoint(config, 1)
    sender = Mirror(config)
    wait_for((tmp_path / "store/a run" / CHECKPOINTS / "step-00000001" / MANIFEST).exists)
    shutil.rmtree(config.folder)
    time.sleep(0.1)
    sender.close()
    fetch(config)
    assert (config.folder / CHECKPOINTS / "step-00000001" / TENSORS).exists()


def test_a_store_that_is_away_is_told_of_once_and_gets_everything_later(quick, tmp_path, capsys):
    config = make_config(tmp_path, f"file://{tmp_path}/store/deep")
    begin_run(config)
    (tmp_path / "store").write_text("in the way")
    sender = Mirror(config)
    add_checkpoint(config, 1)
    wait_for(lambda: sender._failure is not None)
    time.sleep(0.1)
    (tmp_path / "store").unlink()
    wait_for((tmp_path / "store/deep/a run" / CONFIG).exists)
    sender.close()
    told = capsys.readouterr().err
    assert told.count("takes nothing") == 1 and "sends the rest" not in told


def test_a_store_that_stays_away_is_told_at_the_end(quick, tmp_path, capsys):
    config = make_config(tmp_path, f"file://{tmp_path}/store/deep")
    begin_run(config)
    (tmp_path / "store").write_text("in the way")
    Mirror(config).close()
    assert "the same command sends the rest" in capsys.readouterr().err


def test_the_same_command_of_a_finished_run_sends_the_rest(tmp_path, capsys):
    config = make_config(tmp_path, f"file://{tmp_path}/store")
    begin_run(config)
    (config.folder / MLFLOW_FILE).write_text(
        json.dumps({"status": "FINISHED", "tracking_uri": tracking_uri(config)})
    )
    say_finished(config, 4)
    assert (tmp_path / "store" / "a run" / CONFIG).exists()


def test_a_checkpoint_that_is_there_is_not_sent_again(quick, tmp_path, monkeypatch):
    config = make_config(tmp_path, f"file://{tmp_path}/store")
    begin_run(config)
    for step in (1, 2):
        add_checkpoint(config, step)
    Mirror(config).close()
    store = tmp_path / "store" / "a run" / CHECKPOINTS
    (store / "step-00000002" / MANIFEST).write_text("torn")  # whatever has become of its tensors
    copy, sent = mirror.fs.copy_files, []
    monkeypatch.setattr(
        mirror.fs, "copy_files", lambda a, *b, **k: (sent.append(a), copy(a, *b, **k))
    )
    Mirror(config).close()
    folder = config.folder / CHECKPOINTS / "step-00000002"
    assert sent == [str(folder / TENSORS), str(config.folder / CONFIG), str(folder / MANIFEST)]


def test_initial_weights_are_those_that_the_fetched_run_began_with(ray_head, tmp_path, capsys):
    """On a machine that has neither the run nor the one whose weights it took."""
    write_jsonl(tmp_path / "rows.jsonl", numbered_rows(200))
    place = f"file://{tmp_path}/store"
    first = replace(make_config(tmp_path, "", steps=2), name="first")
    run(first)
    config = replace(make_config(tmp_path, place, steps=2), init_from=str(first.folder))
    run(config)
    shutil.rmtree(tmp_path / "runs")
    run(config)
    assert "is finished: 2 steps" in capsys.readouterr().out


def test_what_was_fetched_in_part_is_no_run(tmp_path, monkeypatch):
    config = make_config(tmp_path, f"file://{tmp_path}/store")
    begin_run(config)
    add_checkpoint(config, 1)
    Mirror(config).close()
    shutil.rmtree(tmp_path / "runs")
    copy = mirror.fs.copy_files

    def failing(source, *rest, **options):
        if source.endswith(TENSORS):
            raise OSError("connection reset")
        copy(source, *rest, **options)

    monkeypatch.setattr(mirror.fs, "copy_files", failing)
    with pytest.raises(UserError, match="mirror: .* cannot be read .connection reset"):
        fetch(config)
    assert not config.folder.exists()
    monkeypatch.undo()
    fetch(config)
    assert (config.folder / CHECKPOINTS / "step-00000001" / MANIFEST).exists()
