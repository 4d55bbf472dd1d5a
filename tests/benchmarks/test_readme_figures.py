"""The figures of the README are those of the result files beside them, all of them, and rounded."""

import json
import re
from functools import cache
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = re.compile(r"^\| (?P<what>.*) \| (?P<figure>.*) \| (?P<where>.*`2.*) \|$", re.MULTILINE)


@cache
def result(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def train_step():
    rows = {(r["rule"], r["positions"]): r for r in result("2026-11-22-train-step-h200")["rows"]}
    told = []
    for positions in (16384, 4096):
        ours, theirs = rows["latent", positions], rows["adamw", positions]
        memory = ours["peak_memory_gib"] / theirs["peak_memory_gib"]
        told += [f"{positions:,}", f"{theirs['ms'] / ours['ms']:.2f}", f"{memory:.2f}"]
    return told


def scaling():
    return [str(result("2026-11-23-scaling-h200x2")["rows"][1]["efficiency"])]


def generation():
    rows = result("2026-11-23-generation-h200")["rows"]
    speed = {(r["size"], r["weights"], r["batch"]): r["bytes_per_s"] for r in rows}
    told = []
    for size in ("1024x12", "2048x20"):
        told += size.split("x")
        for batch in (1, 16):
            ratio = speed[size, "ternary", batch] / speed[size, "bfloat16", batch]
            told += [f"{ratio:.2f}", *(["16"] if batch == 16 else [])]
    return told


def loss(file, name):
    found = result(file)
    (run,) = (found.get(name) or found["second set"][name])["runs"]
    assert run["seed"] == 0
    return run


def short_runs():
    rules = ("latent, rates end at 2 %", "ste, rates end at 2 %")
    runs = [loss("2026-11-22-learning-h200", name) for name in rules]
    assert {run["steps"] for run in runs} == {1500}
    return [f"{run['validation']:.3f}" for run in runs]


def long_runs():
    ours = loss("2026-11-23-learning-h200", "zone 21, rate 3, 6000 steps")
    theirs = loss("2026-11-22-learning-h200", "ste, 6000 steps, rates end at 2 %")
    assert ours["steps"] == theirs["steps"] == 6000
    return [f"{run['validation']:.3f}" for run in (ours, theirs)]


def equal_state():
    told = []
    for name, bytes_a_weight in (("latent71", 2), ("adamw12", 12)):
        run = loss("2026-11-22-learning-h200", name)
        megabytes = run["weights"] * bytes_a_weight / 1e6
        told += [f"{run['validation']:.3f}", f"{megabytes:.0f}"]
    return told


def restart():
    seconds = result("2026-11-23-restart")["seconds"]
    return [f"{median(seconds):.1f}", str(len(seconds)), f"{max(seconds):.1f}"]


def chaos():
    found = result("2026-11-23-chaos-200")
    assert found["is_complete"] and not found["faults"]
    return [str(found["kills"])]


def loading():
    found = result("2026-11-23-data-loading-long-tasks")
    rows = found["throughput"] | found["throughput of video"]
    image, audio, video, text = (
        rows[name]["ratio"]["slots_per_s"] for name in ("image", "audio", "video", "text")
    )
    cores = rows["video"]["cores_used"][rows["video"]["against"]]
    return [f"{image:.2f}", f"{audio:.2f}", f"{video:.2f}", f"{cores:.1f}", f"{text:.2f}"]


def recall():
    found = result("2026-11-23-recall-cpu")
    two, four = found["runs_of_two_pairs"], found["runs_of_four_pairs"]
    assert {runs["options"]["table_rate"] for runs in (two, four)} == {"1.0"}
    hca, window, hard = (100 * run["recall"] for run in two["runs"] + four["runs"])
    guess = 100 / 64
    return ["2", f"{hca:.1f}", f"{window:.1f}", f"{guess:.1f}", "4", f"{hard:.1f}"]


def waits():
    rows = result("2026-11-23-data-loading-long-tasks")["wait"]
    return [f"{rows[name]['wait_pct']:.1f}" for name in ("image", "mix")]


FIGURES = [
    train_step,
    scaling,
    generation,
    short_runs,
    long_runs,
    equal_state,
    restart,
    chaos,
    loading,
    recall,
    waits,
]
ROWS = [match.groupdict() for match in COLUMNS.finditer((ROOT / "README.md").read_text())]


def test_every_row_has_its_figures():
    assert len(ROWS) == len(FIGURES)


@pytest.mark.parametrize("number", range(len(FIGURES)), ids=[f.__name__ for f in FIGURES])
def test_the_figures_of_a_row_are_those_of_its_files(number):
    row, told = ROWS[number], FIGURES[number]()
    assert re.findall(r"\d[\d,]*(?:\.\d+)?", row["figure"]) == told
    for name in re.findall(r"`(2[^`]+)`", row["where"]):
        result(name)


def test_the_corrected_shares_are_those_of_the_fastest_kernel():
    found = result("2026-11-22-kernels-h200")
    rate = {row["op"]: row["GB/s"] for row in found["rows"]}
    best = max(rate.values())
    assert f"{best:,.0f}" == "4,092" and f"{1e9 * best / found['ceilings']['copy']:.0%}" == "149%"
    told = ("update 4096x4096", "update 8192x8192", "decode fp8 batch 1 8192x8192")
    told += ("decode fp8 batch 1 28672x8192",)
    assert [f"{rate[op] / best:.0%}" for op in told] == ["27%", "26%", "44%", "68%"]
    log = (ROOT / "LOG.md").read_text()
    assert "reaches 27 and 26 %" in log and "68 % at 28672 x 8192" in log
