"""The folder of a run: refused where nothing can be written, free until the first step is made."""

import os
from contextlib import closing
from dataclasses import replace

import pytest

from arbitor.errors import UserError
from arbitor.settings import build, write_yaml
from ray_jobs.config import CONFIG, RunConfig
from ray_jobs.construction import with_needed_parts
from ray_jobs.journal import Journal
from ray_jobs.run import run
from ray_jobs.run_folder import announce, steps_done
from ray_jobs.tracking import MLFLOW_FILE


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


def test_the_same_configuration_keeps_its_mlflow_run(failed):
    assert steps_done(failed) == 0
    announce(failed, 0)
    assert (failed.folder / MLFLOW_FILE).exists()


def test_after_the_first_step_it_may_not(failed):
    with closing(Journal(failed.folder)) as journal:
        journal.append(1, {"loss/total": 1.0})
    with pytest.raises(UserError, match=r"another configuration \(seed 0 -> 1\)"):
        steps_done(replace(failed, seed=failed.seed + 1))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(UserError, match="/proc/none/run: /proc/none: No such file"):
        run(make_config("/proc/none", "run"))
    config = make_config(tmp_path, "run")
    config.folder.mkdir()
    config.folder.chmod(0o555)
    with as_nobody(), pytest.raises(UserError, match="run: .*(not be written|Permission denied)"):
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
