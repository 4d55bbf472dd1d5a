"""One driver a run: it holds the lease of the run's folder, and a second driver is refused.

The last file of `owners/` names the holder; `lease.json` is its heartbeat. A holder of this host
that has ended gives the run up at once, one of another host 30 s after its last heartbeat.
"""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from arbitor.errors import UserError
from arbitor.owners import SupersededError, add_owner, read_owners
from ray_jobs.processes import describe, is_here, is_running, replace_text, this_process

NAME = "lease.json"
BEAT_S = 5.0
STALE_S = 30.0


def refuse_if_in_use(folder: Path) -> str:
    """Raises UserError, saying by whom, where the run is in use.

    Otherwise what there is to say of a holder that ended without giving the lease back.
    """
    owners, beat = read_owners(folder), _read_beat(folder)
    if not owners or (beat.get("ended") and beat["holder"] == owners[-1].holder):
        return ""
    holder = owners[-1].holder
    who = describe(holder)
    if is_here(holder):
        if is_running(holder):
            raise UserError(f"{folder}: in use by {who}; end it, or give --run another name")
        return f"taking over from {who}, which has ended"
    age = time.time() - beat.get("time", 0.0)
    if age <= STALE_S:
        raise UserError(
            f"{folder}: in use by {who}, heard of {max(age, 0):.0f} s ago; end it, or give --run"
            f" another name (once it is dead, it is taken over after {STALE_S:.0f} s)"
        )
    return f"taking over from {who}, not heard of for more than {STALE_S:.0f} s"


class Lease:
    """Holds the run in `folder`, whose newest checkpoint has `after_step` steps, until `release`.

    Raises UserError where the run is in use.
    """

    def __init__(self, folder: Path, after_step: int):
        self._folder, self.holder = folder, this_process()
        owners = read_owners(folder)
        last = owners[-1] if owners else None
        if is_stale := refuse_if_in_use(folder):
            print(is_stale)
        try:
            add_owner(folder, last, "driver", after_step, self.holder)
        except SupersededError:
            raise UserError(f"{folder}: another process has just started this run") from None
        self._beat(ended=False)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        try:
            self._beat(ended=True)
        except OSError as error:
            print(f"{self._folder}: its lease could not be given back ({error})")

    def _work(self) -> None:
        while not self._released.wait(BEAT_S):
            try:
                holder = read_owners(self._folder)[-1].holder
                if holder != self.holder:
                    # Whatever this process did from here on would be for nothing.
                    print(f"{self._folder}: {describe(holder)} took it over; this process ends")
                    os._exit(1)
                self._beat(ended=False)
            except OSError as error:
                print(f"{self._folder}: its lease could not be renewed ({error}); trying again")

    def _beat(self, *, ended: bool) -> None:
        values = {"holder": self.holder, "time": time.time(), "ended": ended}
        replace_text(self._folder / NAME, json.dumps(values) + "\n")


def _read_beat(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:  # after a loss of power
        return {"time": path.stat().st_mtime}
