"""The whole product in a minute: `python -m ray_jobs.smoke [key.path=value ...] [flags]`.

Runs configs/smoke.yaml in a fresh folder through the same path as any run, then says whether the
losses fell as they must; exits 1 if they did not.
"""

import math
import sys
import time
from pathlib import Path
from statistics import mean

from arbitor.modality import BYTE_MODALITIES
from data_pipeline.statistics import unigram_entropy
from ray_jobs.config import RunConfig, load_run_config
from ray_jobs.journal import JournalReader, Record
from ray_jobs.run import exit_with_message, run
from ray_jobs.worker import open_run_data

CONFIG = Path(__file__).parents[1] / "configs" / "smoke.yaml"
FALL = 0.9  # the last fifth of a source's losses is below this share of its first five


def main() -> None:
    exit_with_message(lambda: smoke(sys.argv[1:]))


def smoke(arguments: list[str]) -> None:
    name = time.strftime("smoke-%Y%m%d-%H%M%S")
    config = load_run_config("smoke", [str(CONFIG), "--run", name, *arguments], {}, __doc__)
    run(config)
    records = list(JournalReader(config.folder).read())
    faults = [
        fault for source in config.data.active_sources for fault in judge(config, source, records)
    ]
    speed = mean(r.metrics["throughput/positions_per_s"] for r in records[len(records) // 2 :])
    print(f"{speed:,.0f} positions per second in the second half")
    if faults:
        print("smoke failed: " + "; ".join(faults), file=sys.stderr)
        sys.exit(1)
    print(
        "smoke passed: every source's loss fell, those of text and code below what their symbol"
        " counts alone would give"
    )


def judge(config: RunConfig, source: str, records: list[Record]) -> list[str]:
    """Prints how a source's loss went; what it should have reached and did not."""
    losses = [r.metrics[f"loss/{source}"] for r in records if f"loss/{source}" in r.metrics]
    if not losses:
        return [f"{source}: no step served it"]
    first, last = mean(losses[:5]), mean(losses[-max(1, len(losses) // 5) :])
    line = f"{source}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, {len(losses)} steps;"
    line += f" mean of the last fifth {last:.3f}"
    entropy = math.inf
    if config.data.sources[source].modality in BYTE_MODALITIES:
        entropy = unigram_entropy(open_run_data(config), source)
        line += f", unigram entropy of its data {entropy:.3f}"
    print(line)
    faults = []
    if last >= FALL * first:
        faults.append(f"{source}: {last:.3f} is not below {FALL} of its first losses ({first:.3f})")
    if last >= entropy:
        faults.append(f"{source}: {last:.3f} is not below the unigram entropy ({entropy:.3f})")
    return faults


if __name__ == "__main__":
    main()
