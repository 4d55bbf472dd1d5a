"""How many workers Ray Train is asked for, and on what."""

import pytest

from arbitor.errors import UserError
from ray_jobs.config import Scaling
from ray_jobs.scaling import check_gpus


def test_gpus_that_stay_idle_are_told_of(capsys):
    check_gpus(Scaling(), {"CPU": 8.0, "GPU": 2.0}, can_grow=False)
    assert "leaves 2 GPU idle; scaling.use_gpu=true" in capsys.readouterr().out
    check_gpus(Scaling(), {"CPU": 8.0}, can_grow=False)
    check_gpus(Scaling(use_gpu=True), {"GPU": 2.0}, can_grow=False)
    assert capsys.readouterr().out == ""


def test_workers_that_would_wait_for_gpus_for_ever_are_refused():
    asked = Scaling(num_workers=[2, 4], use_gpu=True)
    with pytest.raises(UserError, match="2 workers need a GPU each, this machine has 1; lower"):
        check_gpus(asked, {"GPU": 1.0}, can_grow=False)
    check_gpus(asked, {"GPU": 1.0}, can_grow=True)
    check_gpus(asked, {"GPU": 2.0}, can_grow=False)
