"""The folder of a run: refused where nothing can be written, free until the first step is made."""

import os
import shutil
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from arbitor.errors import UserError
from arbitor.settings import build, write_yaml
from data_pipeline.index import index_sources
from data_pipeline.manifest import manifests_to_json
from data_pipeline.run_data import RunData
from ray_jobs.config import CONFIG, Resume, RunConfig
from ray_jobs.construction import with_needed_parts
from ray_jobs.journal import Journal, JournalReader
from ray_jobs.run import run
from ray_jobs.run_folder import announce, changes_of, check_data, steps_done
from ray_jobs.tracking import MLFLOW_FILE
from ray_jobs.worker import DATA_MANIFEST
from tests.data_pipeline.shards import numbered_rows, write_jsonl


def make_config(storage, name):
    sources = {"text": {"modality": "text", "path": "sample://text"}}
    values = {"name": name, "storage": str(storage), "data": {"sources": sources}}
    return with_needed_parts(build(RunConfig, values))


@pytest.fixture
def failed(tmp_path):
    """The configuration of a run that never made a step, in the folder that it left."""
    config = make_config(tmp_path, "failed")
    config.folder.mkdir(parents=True)
    (config.folder / CONFIG).write_text(write_yaml(config.values()))
    (config.folder / MLFLOW_FILE).write_text('{"run_id": "1", "status": "FAILED"}')
    with closing(Journal(config.folder)) as journal:
        journal.begin(0, "driver")
    return config


def test_before_the_first_step_the_configuration_may_be_mended(failed):
    mended = replace(failed, seed=failed.seed + 1)
    assert steps_done(mended) == 0
    announce(mended, 0)
    assert not (failed.folder / MLFLOW_FILE).exists()  # its MLflow run has other parameters


def test_data_that_changed_before_the_first_checkpoint_is_told_of(failed, tmp_path, capsys):
    """The steps of the journal would be done again with other rows."""
    shards = tmp_path / "shards"
    shards.mkdir()
    source = replace(failed.data.sources["text"], path=str(shards))
    config = replace(failed, data=replace(failed.data, sources={"text": source}))

    def add_shard(name):
        write_jsonl(shards / name, numbered_rows(30, name))
        manifests = index_sources(config.data, tmp_path)
        return manifests, RunData(config.data, manifests, config.seed)

    manifests, data = add_shard("a.jsonl")
    (config.folder / DATA_MANIFEST).write_text(manifests_to_json(manifests))
    _, changed = add_shard("b.jsonl")
    check_data(config, changed)  # no step is done: whatever data there is
    with closing(Journal(config.folder)) as journal:
        journal.append(1, {"loss/total": 1.0})
    check_data(config, data)
    check_data(replace(config, save=False), changed)  # starts over
    with pytest.raises(UserError, match=r"since step 0 \(text: added .*b.jsonl\)"):
        check_data(config, changed)
    check_data(replace(config, resume=Resume(allow_changed_data=True)), changed)
    assert "going on after step 0 with changed data" in capsys.readouterr().out
    with closing(Journal(config.folder)) as journal:
        journal.append(1, {"loss/total": 2.0})  # need not repeat


def test_a_run_that_goes_on_without_saving_keeps_what_is_recorded_of_it(failed):
    with closing(Journal(failed.folder)) as journal:
        journal.append(1, {"loss/total": 1.0})
    announce(replace(failed, save=False), 1)
    assert [record.step for record in JournalReader(failed.folder).read()] == [1]
    assert (failed.folder / MLFLOW_FILE).exists()
    announce(replace(failed, save=False), 0)  # there is no checkpoint: it starts over
    assert not list(JournalReader(failed.folder).read())


def test_a_configuration_that_a_loss_of_power_has_emptied_is_named(failed):
    with closing(Journal(failed.folder)) as journal:
        journal.append(1, {"loss/total": 1.0})
    (failed.folder / CONFIG).write_text("")
    with pytest.raises(UserError, match=f"{failed.folder / CONFIG}: is empty or cut off"):
        steps_done(failed)


def test_the_same_configuration_keeps_its_mlflow_run(failed):
    assert steps_done(failed) == 0
    announce(failed, 0)
    assert (failed.folder / MLFLOW_FILE).exists()


def test_after_the_first_step_it_may_not(failed):
    with closing(Journal(failed.folder)) as journal:
        journal.append(1, {"loss/total": 1.0})
    with pytest.raises(UserError, match=r"another configuration \(seed 0 -> 1\)"):
        steps_done(replace(failed, seed=failed.seed + 1))


def test_a_key_may_change_only_by_its_whole_name():
    before = {"steps": 1, "steps_of_another_kind": 1, "tracking.uri": "a"}
    now = {"steps": 2, "steps_of_another_kind": 2, "tracking.uri": "b"}
    assert changes_of(before, now) == ["steps_of_another_kind 1 -> 2"]


@pytest.fixture
def open_folder():
    """A folder that every user may look into; pytest's own are for one user alone."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_folder_that_cannot_be_written_is_refused(open_folder):
    with pytest.raises(UserError, match="/proc/none/run: /proc/none: No such file"):
        run(make_config("/proc/none", "run"))
    config = make_config(open_folder, "run")
    config.folder.mkdir()
    config.folder.chmod(0o555)
    with as_nobody(), pytest.raises(UserError, match="run: may not be written to"):
        run(config)


class as_nobody:  # noqa: N801  (reads as a clause)
    """Root may write everywhere."""

    def __enter__(self):
        self._uid = os.geteuid()
        if self._uid == 0:
            os.seteuid(65534)

    def __exit__(self, *exception):
        if self._uid == 0:
            os.seteuid(0)
