"""The journal of a run: what is replayed must come out as it was recorded."""

from contextlib import closing

import pytest

from ray_jobs.journal import CHANGED, Journal, JournalReader, ReplayError


def test_a_replayed_step_is_compared_but_for_what_a_note_excepts(tmp_path):
    journal = Journal(tmp_path)
    for step in (1, 2):
        journal.append(step, {"loss/total": 2.0, "throughput/x": 1.0})
    journal.close()
    again = Journal(tmp_path, start=1)
    again.append(2, {"loss/total": 2.0, "throughput/x": 3.0, "validation/text": 1.0})
    again.append(3, {"loss/total": 2.0})
    again.close()
    other = Journal(tmp_path, start=1)
    with pytest.raises(ReplayError, match=r"step 2 .* \(loss/total 2.0 -> 2.5\)"):
        other.append(2, {"loss/total": 2.5})
    other.note(f"{CHANGED} with other data")
    other.close()
    with closing(Journal(tmp_path, start=1)) as excepted:
        excepted.append(2, {"loss/total": 2.5})
    assert [record.step for record in JournalReader(tmp_path).read()] == [1, 2, 3]
