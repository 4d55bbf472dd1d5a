"""A real Ray Train job over five sources whose workers are killed: the logged slots are the plan.

`python -m benchmarks.data_chaos` is the long form.
"""

import pytest

from benchmarks.data_chaos import Chaos, run_chaos
from benchmarks.logged_slots import SlotError
from data_pipeline.schema import SourceConfig
from tests.data_pipeline.media_shards import SHAPE, media_rows, write_media_parquet
from tests.data_pipeline.shards import numbered_rows, run_data, write_parquet

ROWS = {"image": 64, "audio": 48, "video": 32}

pytestmark = [
    pytest.mark.usefixtures("ray_head"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray's own making
]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Five sources of Parquet shards in small windows."""
    monkeypatch.setattr("data_pipeline.run_data.WINDOW_SYMBOLS", 2000)
    paths = {name: tmp_path / f"{name}.parquet" for name in ("text", "code", *ROWS)}
    write_parquet(paths["text"], numbered_rows(300))
    write_parquet(paths["code"], numbered_rows(100, "code"))
    for modality, count in ROWS.items():
        write_media_parquet(paths[modality], media_rows(modality, count), modality)
    sources = {name: SourceConfig(name, str(path), 0.2) for name, path in paths.items()}
    return run_data(tmp_path, sources, seed=3, **SHAPE)


def test_workers_killed_at_random_instants_log_the_plan(data, tmp_path):
    chaos = Chaos(tmp_path, data, 80, kills=2, seed=5, commit_interval=5, longest_life_s=0.5)
    starts = run_chaos(chaos)
    found = chaos.check(starts)
    assert found["workers_killed"] == 2 and {start.world for start in starts} == {1, 2}
    assert found["slots_compared"] >= found["slots_of_plan"] == 320


def test_two_windows_swapped_in_the_decode_step_are_found(data, tmp_path):
    """Each comes under the other's name, of one source, so that the stream has
    nothing to object to."""

    def swap():
        import json

        from data_pipeline import stream

        decode = stream.decode_windows

        def swapped(batch):
            windows = list(decode(batch))
            headers = [window.column("header") for window in windows]
            sources = [json.loads(header[0].as_py())["key"][0] for header in headers]
            j = next((j for j, name in enumerate(sources) if name in sources[:j]), 0)
            i = sources.index(sources[j])
            windows[i], windows[j] = windows[j], windows[i]
            yield from (w.set_column(0, "header", h) for w, h in zip(windows, headers, strict=True))

        stream.decode_windows = swapped

    chaos = Chaos(tmp_path, data, 10, kills=0, seed=0, prepare=swap)
    starts = run_chaos(chaos)
    with pytest.raises(SlotError):
        chaos.check(starts)
