"""The record of a run says how to run it again and nothing of the machine's folders."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.media import merge
from benchmarks.record import Record, environment, out_path, portable


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("/tmp/a/b.json", "b.json"),
        ("--out=/tmp/x.json", "--out=x.json"),
        ("../../x/y", "y"),
        (".gpu/rows.safetensors", "rows.safetensors"),
        ("data.sources.text.path=/root/x/y", "data.sources.text.path=y"),
        ("benchmarks/results/x.json", "benchmarks/results/x.json"),
        ("s3://shards/text", "s3://shards/text"),
        ("sample://text", "sample://text"),
        ("window + HCA", "window + HCA"),
        ("a/b", "a/b"),
    ],
)
def test_paths_of_this_machine_are_not_told(argument, told):
    assert portable(argument) == told


def test_a_record_is_of_the_options_before_the_run(tmp_path, monkeypatch):
    out = tmp_path / "new" / "found.json"
    monkeypatch.setattr("sys.argv", ["/work/benchmarks/parts.py", "--steps", "2", f"--out={out}"])
    options = argparse.Namespace(steps=2, data=Path("/root/text.xz"), seeds=[0, 1], out=out)
    out_path(str(out))
    record = Record(options)
    options.steps = 3
    told = record.write(out, rows=[1.5])
    assert told["command"] == "python -m benchmarks.parts --steps 2 --out=found.json"
    assert told["options"] == {"steps": 2, "data": "text.xz", "seeds": [0, 1]}
    assert told["rows"] == [1.5] and len(told["load_average"]["before"]) == 3
    assert json.loads(out.read_text()) == json.loads(json.dumps(told))
    assert [path.name for path in out.parent.iterdir()] == ["found.json"]


def test_the_environment_names_commit_processor_and_versions():
    found = environment()
    assert {"device", "cpu", "cpus", "python", "torch", "numpy", "ray"} <= found.keys()
    assert found["cpu"] and isinstance(found["changed_since_commit"], bool)


def test_a_wrong_out_is_refused_before_the_run(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match="file cannot be made: .*; name a file"):
        out_path(str(tmp_path / "file" / "found.json"))
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be written; name a file"):
        out_path(str(tmp_path))


def test_merged_runs_keep_how_each_was_run(tmp_path):
    losses = {"text": {"first": 5.0, "last": 1.0, "last judged": 1.0}}
    run = {"losses": losses, "held_out": {"text": {"loss": 1.0, "baseline": 2.0}}}
    for number, name in enumerate(("all", "text")):
        record = {"environment": {"commit": name}, "options": {"seed": number}, "runs": {name: run}}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    found = merge([tmp_path / "all.json", tmp_path / "text.json"])
    assert found["verdicts"]["text"]["not worse"]
    for number, name in enumerate(("all", "text")):
        assert found["runs"][name]["environment"] == {"commit": name}
        assert found["runs"][name]["options"] == {"seed": number}
