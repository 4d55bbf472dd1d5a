"""The commands as a user types them: the classic ones, the mistakes, the README's."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.sample import ensure_sample
from ray_jobs import pretrain, text
from ray_jobs.journal import JournalReader
from ray_jobs.run import main

ROOT = Path(__file__).parents[2]
JOBS = {"text": text, "pretrain": pretrain}


def call(monkeypatch, command):
    """Runs `JOB ARGUMENTS` in this process, on the Ray that the tests share if one is up."""
    job, *arguments = shlex.split(command)
    monkeypatch.setattr(sys, "argv", [job, *arguments])
    main(job, JOBS[job].__doc__, JOBS[job].DEFAULTS)


def losses(output):
    return [float(loss) for loss in re.findall(r"^step +\d+/\d+  loss (\d+\.\d+)", output, re.M)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder to work in, with training/data/tinyshakespeare.txt made of the sample's prose."""
    folder = tmp_path_factory.mktemp("workplace")
    shard = sorted(ensure_sample("text", folder / "runs" / "samples").glob("*.parquet"))[0]
    rows = pq.read_table(shard).column("text").to_pylist()
    path = folder / "training" / "data" / "tinyshakespeare.txt"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(rows[:200]))
    return folder


def test_classic_text_command(ray_head, monkeypatch, workplace, capfd):
    monkeypatch.chdir(workplace)
    call(
        monkeypatch,
        "text --steps 3 --batch 1 --ctx 8 --eval-interval 0 --log-interval 1 --backend triton"
        " --run text-smoke",
    )
    output = capfd.readouterr().out
    assert len(losses(output)) == 3
    assert "validation" not in output
    assert (workplace / "runs/text-smoke/checkpoints/step-00000003/manifest.json").exists()


def test_classic_pretrain_command(ray_head, monkeypatch, workplace, capfd):
    monkeypatch.chdir(workplace)
    call(
        monkeypatch,
        "pretrain --steps 2 --batch 1 --ctx 8 --text-data training/data/tinyshakespeare.txt"
        " --text-weight 1.0 --code-weight 0 --image-weight 0 --audio-weight 0 --video-weight 0"
        " --eval-interval 0 --log-interval 1 --save-interval 0 --no-save --backend triton"
        " --no-vq --no-graph --no-moe --no-attention --run pretrain-smoke-lite",
    )
    assert len(losses(capfd.readouterr().out)) == 2
    assert not (workplace / "runs/pretrain-smoke-lite/checkpoints").exists()


def test_classic_full_text_stack_command(ray_head, monkeypatch, workplace, capfd):
    monkeypatch.chdir(workplace)
    call(
        monkeypatch,
        "text --steps 1 --batch 1 --ctx 4 --eval-interval 0 --log-interval 1 --backend triton"
        " --full-text-stack --run text-full-stack-smoke",
    )
    assert len(losses(capfd.readouterr().out)) == 1
    (record,) = JournalReader(workplace / "runs/text-full-stack-smoke").read()
    figures = {"vq/perplexity", "graph/edges_per_code", "moe/load_max", "loop/rounds"}
    assert figures <= record.metrics.keys()


def broken_parquet(folder):
    path = folder / "broken.parquet"
    pq.write_table(pa.table({"text": ["a" * 100] * 50}), path)
    path.write_bytes(path.read_bytes()[:-60])
    return path


def text_file(folder, name, content):
    path = folder / name
    path.write_text(content)
    return path


MISTAKES = {
    "unknown key": ("text model.widht=3", "model.widht.*did you mean model.width"),
    "missing file": ("text --text-data none.txt", "none.txt does not exist"),
    "empty file": ("text --text-data {empty}", "empty.txt is empty"),
    "no shards": ("text --text-data {folder}", "no shards in folder"),
    "corrupt Parquet": ("text --text-data {broken}", "broken.parquet: not a readable Parquet"),
    "no weight": ("text --text-weight 0", "data.sources: .*weight"),
    "no batch": ("text --batch 0", "data.batch_size: .*1"),
    "too many workers": ("text scaling.num_workers=9", "9 workers cannot share 4 slots"),
    "graph without codes": (
        "text --steps 1 --batch 1 --ctx 4 --full-text-stack --no-vq",
        "model.enable_graph: .* give --no-graph",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_ends_with_one_line_and_exit_code_2(mistake, monkeypatch, tmp_path, capfd):
    command, message = MISTAKES[mistake]
    (tmp_path / "folder").mkdir()
    command = command.format(
        empty=text_file(tmp_path, "empty.txt", ""),
        folder=tmp_path / "folder",
        broken=broken_parquet(tmp_path),
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        call(monkeypatch, command)
    output = capfd.readouterr()
    assert exit_info.value.code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", output.err)
    assert output.out == ""
    assert not list(tmp_path.glob("runs/*/config.yaml")), "a refused run leaves no folder"


def readme_commands():
    """The lines of its `sh` blocks and the model's; of smoke the suite runs a smaller one."""
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/model.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line]
    slow = {"make smoke": pytest.mark.slow}
    return [pytest.param(line, marks=slow.get(line, ())) for line in lines]


@pytest.mark.parametrize("command", readme_commands())
def test_the_readmes_commands_run(command, workplace):
    """As typed, but for the interpreter of this test run and a storage of its own."""
    storage = f"storage={workplace / 'runs'}"
    command = command.replace(".venv/bin/python", sys.executable)
    if command == "make smoke":
        command = f"{sys.executable} -m ray_jobs.smoke"
    if " runs/" in command:  # the run of the command before
        command = command.replace(" runs/", f" {workplace / 'runs'}/")
    elif "ray_jobs" in command:
        command = f"{command} {storage}"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
