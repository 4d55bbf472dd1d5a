"""The commands of docs/data.md, as typed there, in a fresh folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_commands_of_the_docs_run(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "samples").symlink_to(tmp_path / "shards")  # the first command makes them
    text = (ROOT / "docs" / "data.md").read_text()
    commands = re.search(r"^```sh\n(.*?)^```", text, re.M | re.S)[1].splitlines()
    assert len(commands) == 4
    outputs = []
    for command in commands:
        done = subprocess.run(
            command.replace(".venv/bin/python", sys.executable),
            shell=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(done.stdout)
    assert re.search(r"^clean: all \d,\d+ rows can be decoded$", outputs[1], re.M)
    mix = re.search(r"^Mix:\n.*\n((?:.+\n)+)", outputs[2], re.M)[1]
    assert mix in text, "the docs show another plan"
    assert (tmp_path / "preview" / "index.md").exists()
