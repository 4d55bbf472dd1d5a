"""The table of a plan's states in the run folder: one every 1,024 steps, so that a resumed run, and
every process that walks its plan, need not go through all steps from the first.
"""

import json
from pathlib import Path

from data_pipeline.plan import BLOCK_STEPS, TABLE_BLOCKS, Plan

NAME = "plan-states.jsonl"


class StateTable:
    """Lines of (step, slots served by source and lane); the first names the plan they belong to."""

    def __init__(self, folder: Path, fingerprint: str):
        self._path, self._fingerprint = folder / NAME, fingerprint
        self._steps = set(self.load())

    def load(self) -> dict[int, list[list[int]]]:
        """The states by step; none where the file is missing, torn or of another plan."""
        if not self._path.exists():
            return {}
        lines = self._path.read_bytes().split(b"\n")[:-1]  # a line without an end is torn
        if not lines or json.loads(lines[0]) != {"plan": self._fingerprint}:
            return {}
        return {step: served for step, served in map(json.loads, lines[1:])}

    def add(self, plan: Plan, step: int) -> None:
        """Appends the state of `step` if the table is to have it and has not."""
        if step % (BLOCK_STEPS * TABLE_BLOCKS) or step in self._steps:
            return
        states = self.load() | dict([plan.state(step)])
        lines = [{"plan": self._fingerprint}, *sorted(states.items())]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        partial.replace(self._path)
        self._steps = set(states)
