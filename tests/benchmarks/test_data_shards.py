"""What the data pipeline is timed with is whole, of today's making, and changes nothing else."""

import argparse

import pyarrow.parquet as pq
import pytest

from benchmarks import data_chaos, data_loading, data_shards, stream_life
from data_pipeline import run_data as run_data_module
from data_pipeline.run_data import read_slots


def sizes():
    return run_data_module.WINDOW_SYMBOLS, run_data_module.WINDOWS_PER_LANE


def test_small_windows_are_those_of_one_object_alone(tmp_path, monkeypatch):
    before = sizes()
    monkeypatch.setattr(data_chaos, "WEIGHTS", {"text": 0.6, "code": 0.4})
    assert len(data_shards.small_windows(tmp_path / "small").windows["text"]) == 1004
    assert len(data_chaos.sample_data(tmp_path, seed=0).windows["text"]) > 10
    assert sizes() == before


@pytest.fixture
def few_rows(monkeypatch):
    monkeypatch.setattr(data_shards, "TEXT_BYTES", 1 << 17)
    monkeypatch.setattr(data_shards, "ROWS", {"image": 64})
    monkeypatch.setattr(data_shards, "DISTINCT", 2)


def test_shards_half_written_or_of_another_size_are_not_used(tmp_path, few_rows, monkeypatch):
    write, written = pq.write_table, []

    def interrupted(*arguments, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(arguments)
        write(*arguments, **options)

    monkeypatch.setattr(pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data_shards.shards("text", tmp_path)
    monkeypatch.setattr(pq, "write_table", write)
    whole = data_shards.shards("text", tmp_path)
    assert len(list(whole.iterdir())) == data_shards.SHARDS
    assert data_shards.shards("text", tmp_path) == whole
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]
    monkeypatch.setattr(data_shards, "TEXT_BYTES", 1 << 16)
    assert data_shards.shards("text", tmp_path) != whole


def test_readings_of_memory_are_whole():
    assert stream_life.whole_readings("40") == 40
    for text in ("0", "19", "50", "-20"):
        with pytest.raises(argparse.ArgumentTypeError, match="multiple of 20"):
            stream_life.whole_readings(text)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_the_loader_gives_the_slots_of_the_plan_s_windows(tmp_path, few_rows, modality):
    """By one worker: the windows in the plan's order, each to its end."""
    data = data_shards.timed_data(tmp_path, {modality: 1.0}, decode_tasks=1)
    keys = list(data.plan.windows(0, 4, 0, 1))
    slots = data_loading.loader(data, workers=1)
    for key in keys[:2]:
        task = data.task(key)
        window, _ = task.read()
        for start in range(0, len(window.sequences), task.batch_size):
            part = slice(start, start + task.batch_size)
            symbols, content = next(slots)
            assert (symbols.numpy() == window.sequences[part]).all()
            assert (content is None) == (modality == "text")
            if content is not None:
                assert (content.numpy() == window.content[part]).all()
    slots.close()
    assert next(read_slots(data, 0, 1, 0, 1)).symbols.shape == symbols.shape


def test_the_stream_is_compared_with_the_fastest_loader():
    def way(slots, cores):
        return {"slots_per_s": slots, "cpu_s_per_slot": cores / slots, "cores_used": cores}

    rounds = [{"stream": way(6, 2), "loader of 2": way(4, 1.4), "loader of 3": way(5, 2)}] * 3
    assert data_loading.compare(rounds) == {
        "against": "loader of 3",
        "ratio": {"slots_per_s": 1.2, "cpu_s_per_slot": 0.833},
        "cores_used": {"stream": 2, "loader of 3": 2},
    }
