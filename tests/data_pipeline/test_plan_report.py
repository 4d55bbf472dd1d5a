"""`python -m data_pipeline.plan`: every number against the plan walked slot by slot."""

import re
from collections import Counter
from dataclasses import fields

import pytest

from arbitor.errors import UserError
from arbitor.settings import write_yaml
from data_pipeline.command import DataSettings, in_units, read_settings
from data_pipeline.mixture import weight_at, weight_points
from data_pipeline.plan import WindowKey
from data_pipeline.plan_report import describe_plan, plan_command, window_bytes
from data_pipeline.schema import SourceConfig
from ray_jobs.config import RunConfig
from tests.data_pipeline.media_shards import five_source_data
from tests.data_pipeline.shards import numbered_rows, run_data, write_jsonl

STEPS = 300


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return five_source_data(tmp_path_factory.mktemp("five"))


def report(data, steps=STEPS, num_workers=1):
    """The paragraphs; a table is {first cell: other cells}."""
    settings = DataSettings(data.config, steps, data.seed, num_workers=num_workers)
    paragraphs = list(describe_plan(settings, data))
    tables = [
        {cells[0]: cells[1:] for cells in (re.split(r"  +", line) for line in text.splitlines())}
        for text in paragraphs
    ]
    return paragraphs, tables


def served(data, steps):
    """By source, the step of each slot in order."""
    by_source = {name: [] for name in data.manifests}
    for slot in data.plan.walk(0, steps, 0, 1):
        by_source[slot.source].append(slot.step)
    return by_source


def test_slots_and_shares_are_those_of_the_plan(five):
    paragraphs, (_, _, mix, _, _) = report(five)
    assert paragraphs[0].startswith("300 steps of 4 slots of 128 positions: 1,200 slots")
    steps = served(five, STEPS)
    points = {name: weight_points(s.weight) for name, s in five.config.sources.items()}

    def share(name, step):
        total = sum(weight_at(points[other], step) for other in points)
        return float(weight_at(points[name], step) / total)

    for name in five.manifests:
        start, end, due, planned, planned_share = mix[name]
        assert start == f"{share(name, 0):.2%}" and end == f"{share(name, STEPS - 1):.2%}"
        assert planned == f"{len(steps[name]):,}"
        assert planned_share == f"{len(steps[name]) / 1200:.2%}"
        exact = 4 * sum(share(name, step) for step in range(STEPS))
        assert abs(float(due.replace(",", "")) - exact) < 0.05  # weights are whole millionths
        assert abs(len(steps[name]) - exact) <= 1


def test_epochs_and_repeats_are_counted(five):
    _, (_, epoch, _, epochs, _) = report(five)
    steps = served(five, STEPS)
    for name in five.manifests:
        size = sum(micro_batches(five, name))
        assert epoch[name][-1] == f"{size:,}"
        number, repeats = epochs[name]
        assert number == f"{len(steps[name]) / size:.2f}"
        # The slot after k epochs may be of the same step as the last one of them.
        expected = [
            steps[name][k * size - 1] + 1 for k in range(1, (len(steps[name]) - 1) // size + 1)
        ]
        shown = repeats.split(" and ")[0]
        assert shown == (", ".join(f"{step:,}" for step in expected[:4]) or "-")
        if len(expected) > 4:
            assert repeats.endswith(f" and {len(expected) - 4:,} more")
    assert any(len(epochs[name][1]) > 12 for name in five.manifests), "some repeat often"


def micro_batches(data, name):
    return next(s for s in data.plan.sources if s.name == name).micro_batches_per_window


def test_rows_shards_and_held_out_rows_are_counted(five):
    _, (_, epoch, *_) = report(five)
    assert epoch["text"][:4] == ["text", "1", "294", "6"]
    assert epoch["image"][:4] == ["image", "4", "47", "1"]
    assert epoch["video"][:4] == ["video", "1", "19", "1"]


def test_window_bytes_are_those_of_the_packed_windows(five):
    for source in five.plan.sources:
        for number, expected in enumerate(window_bytes(five, source)):
            window, _ = five.task(WindowKey(source.name, 0, 0, number)).read()
            content = 0 if window.content is None else window.content.nbytes
            assert window.sequences.nbytes + content == expected


def test_memory_is_held_by_the_lanes_of_a_worker(five):
    for workers, lanes in ((1, 4), (2, 2), (3, 2)):
        _, (*_, memory) = report(five, num_workers=workers)
        for source in five.plan.sources:
            sizes = window_bytes(five, source)
            mean = sum(sizes) / len(sizes)
            expected = [str(lanes), *map(in_units, (mean, max(sizes), lanes * mean))]
            assert memory[source.name] == expected


def limited(folder, **limits):
    for name in ("a", "b"):
        write_jsonl(folder / f"{name}.jsonl", numbered_rows(60, name))
    sources = {
        "a": SourceConfig("text", str(folder / "a.jsonl"), 0.5, **limits),
        "b": SourceConfig("text", str(folder / "b.jsonl"), 0.5),
    }
    return run_data(folder, sources, batch_size=1, sequence_length=64)


def test_a_dropped_source_says_from_which_step(tmp_path):
    data = limited(tmp_path, max_epochs=2)
    last = served(data, STEPS)["a"][-1]
    assert last < STEPS - 1
    paragraphs, (_, _, mix, epochs, _) = report(data)
    line = f"a is dropped from step {last + 1:,} (data.sources.a.max_epochs is 2)"
    assert line in paragraphs[3].splitlines()
    assert epochs["a"][0] == "2.00" and mix["a"][1] == "0.00%"


def test_a_run_that_ends_early_says_where_and_why(tmp_path):
    data = limited(tmp_path, max_epochs=1, when_exhausted="stop")
    paragraphs, _ = report(data)
    assert paragraphs[0].startswith(f"{data.plan.end:,} steps of 4 slots")
    assert paragraphs[3].splitlines()[-1] == (
        f"the run ends before step {data.plan.end:,} of 300: data.sources.a.max_epochs is 1"
    )
    assert Counter(served(data, STEPS)["a"])[data.plan.end] == 0


def test_the_command_reads_only_what_the_data_follows_from(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", numbered_rows(60))
    values = {
        "steps": 7,
        "storage": str(tmp_path / "runs"),
        "model": {"widht": "nobody reads this"},
        "scaling": {"num_workers": 2, "use_gpu": True},
        "data": {"sources": {"a": {"path": str(tmp_path / "a.jsonl")}}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(write_yaml(values))
    assert plan_command([str(path)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("7 steps of 4 slots of 1,024 positions: 28 slots")
    assert "Memory of each of 2 workers" in output
    assert plan_command(["steps=9", str(path), "data.slots_per_step=2"]) == 0
    assert capsys.readouterr().out.startswith("9 steps of 2 slots")
    assert plan_command([str(path), "scaling.num_workers=[3,4]"]) == 0
    assert "Memory of each of 3 workers" in capsys.readouterr().out


def test_defaults_are_those_of_a_run():
    run = {f.name: f for f in fields(RunConfig)}
    for field in fields(DataSettings):
        if field.name != "num_workers":
            ours, theirs = default_of(field), default_of(run[field.name])
            assert ours == theirs, field.name
    assert DataSettings.num_workers == RunConfig(name="x").scaling.num_workers


def default_of(field):
    return field.default_factory() if callable(field.default_factory) else field.default


MISTAKES = {
    "steps=0": "steps: expected at least 1",
    "scaling.num_workers=5": "scaling.num_workers: expected 1 to 4",
    "data.slot_per_step=3": "did you mean data.slots_per_step",
    "data.sources.a.path=none.txt": "data.sources.a.path: none.txt does not exist",
    "data=3": "data: expected a section",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_mistakes_name_the_key(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(write_yaml({"data": {"sources": {"a": {"path": "a.txt"}}}}))
    with pytest.raises(UserError, match=MISTAKES[word]):
        plan_command([str(path), word])
    with pytest.raises(UserError, match="expected one CONFIG file, got none"):
        read_settings([word])
