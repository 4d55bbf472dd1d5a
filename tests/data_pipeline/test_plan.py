"""The plan on hundreds of random cases: exact mixture, no row lost or doubled, any world size."""

import random
from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

from data_pipeline import plan as plan_module
from data_pipeline.mixture import MILLION, Mixture, weight_at, weight_points
from data_pipeline.plan import Plan, PlannedSource, SourceLanes


def random_weight(rng, horizon):
    kind = rng.random()
    if kind < 0.4:
        return rng.choice([1.0, 0.1, 0.3, 3, 1e-3, round(rng.random(), 4) + 1e-4])
    steps = sorted(rng.sample(range(horizon), rng.randint(1, 5)))
    return [[step, rng.choice([0, 0, 1, round(rng.random(), 3)])] for step in steps]


def random_weights(rng, horizon, num_sources):
    """Weights that at no step are all zero."""
    weights = [random_weight(rng, horizon) for _ in range(num_sources)]
    weights[rng.randrange(num_sources)] = rng.choice([0.05, 1.0, [[0, 1.0], [horizon // 2, 0.2]]])
    return weights


def random_source(rng, name, weight):
    windows = rng.choice([1, 1, 2, 5, rng.randint(1, 40)])
    largest = rng.choice([1, 1, 3, 64])
    return PlannedSource(name, weight, [rng.randint(1, largest) for _ in range(windows)])


def random_plan(rng, slots=None, horizon=120):
    weights = random_weights(rng, horizon, rng.randint(1, 5))
    sources = [random_source(rng, f"source{i}", weight) for i, weight in enumerate(weights)]
    slots = slots or rng.choice([1, 2, 3, 4, 4, 7, 16, 33])
    return Plan(sources, slots, seed=rng.randrange(1 << 40))


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Runs of a hundred steps then cross several blocks."""
    monkeypatch.setattr(plan_module, "BLOCK_STEPS", 16)


def test_millionths_sum_exactly_and_follow_the_schedule():
    rng = random.Random(0)
    for _ in range(100):
        weights = random_weights(rng, 200, rng.randint(1, 5))
        points = [weight_points(weight) for weight in weights]
        millionths = Mixture(points, 4).millionths
        assert (millionths >= 0).all() and (millionths.sum(axis=0) == MILLION).all()
        for step in rng.sample(range(millionths.shape[1]), min(5, millionths.shape[1])):
            exact = [weight_at(p, step) for p in points]
            for share, weight in zip(millionths[:, step].tolist(), exact, strict=True):
                assert abs(share - weight * MILLION / sum(exact)) < 1
                assert weight > 0 or share == 0


def test_large_denominators_take_the_exact_path():
    points = [weight_points([[0, 0.1234567890123], [99_991, 1e-9]]), weight_points(1.0)]
    millionths = Mixture(points, 4).millionths
    weight = weight_at(points[0], 77_777)
    assert abs(int(millionths[0, 77_777]) - weight * MILLION / (weight + 1)) < 1


def test_every_source_stays_within_one_slot_of_its_share():
    rng = random.Random(1)
    for _ in range(150):
        weights = random_weights(rng, 60, rng.randint(1, 6))
        slots = rng.choice([1, 2, 4, 5, 16])
        mixture = Mixture([weight_points(weight) for weight in weights], slots)
        assert_within_one_slot(mixture, 100 * slots)


def test_within_one_slot_with_many_slots_and_adversarial_schedules():
    alternating = [[2 * i + j, j] for i in range(40) for j in (0, 1)]
    opposite = [[step, 1 - weight] for step, weight in alternating]
    points = [weight_points(weight) for weight in (alternating, opposite, 1e-4)]
    for slots in (1, 3, 300):
        assert_within_one_slot(Mixture(points, slots), 100 * slots)


def assert_within_one_slot(mixture, num_slots):
    counts, due = [0] * mixture.num_sources, [0] * mixture.num_sources
    columns = mixture.millionths.T.tolist()
    for slot, chosen in enumerate(mixture.serve(0, num_slots, counts)):
        counts[chosen] += 1
        shares = columns[min(slot // mixture.slots_per_step, len(columns) - 1)]
        for i, share in enumerate(shares):
            due[i] += share
            assert abs(due[i] - counts[i] * MILLION) < MILLION, (slot, i)
    assert due == [mixture.due(i, num_slots - 1) for i in range(mixture.num_sources)]


def test_a_longer_run_starts_with_the_same_slots():
    """Served piece by piece, as a resumed run does, the order is the same."""
    rng = random.Random(2)
    for _ in range(40):
        mixture = Mixture([weight_points(w) for w in random_weights(rng, 50, 4)], 4)
        whole = mixture.serve(0, 400, [0] * 4)
        cut = rng.randrange(400)
        counts = [whole[:cut].count(i) for i in range(4)]
        assert whole == mixture.serve(0, cut, [0] * 4) + mixture.serve(cut, 400 - cut, counts)


def test_a_round_takes_every_micro_batch_once():
    rng = random.Random(3)
    for case in range(150):
        source = random_source(rng, "text", 1.0)
        lanes = SourceLanes(source, rng.choice([1, 2, 3, 4, 16, 300]), seed=case)
        turn = rng.randrange(3)
        taken = Counter()
        for lane, length in enumerate(lanes.lengths.tolist()):
            count = turn * length + np.arange(length)
            places = np.stack(lanes.locate(np.full(length, lane), count), axis=1)
            taken.update(map(tuple, places.tolist()))
        epochs = range(turn * lanes.epochs_per_round, (turn + 1) * lanes.epochs_per_round)
        assert taken == Counter(
            (epoch, window, micro_batch)
            for epoch in epochs
            for window, size in enumerate(source.micro_batches_per_window)
            for micro_batch in range(size)
        )
        assert lanes.lengths.max() - lanes.lengths.min() <= 1


def test_an_epoch_through_the_plan_is_complete():
    """One source and as many micro-batches as lanes x steps: the first steps are one epoch."""
    plan = Plan([PlannedSource("text", 1.0, [5, 3, 8, 4])], slots_per_step=4, seed=5)
    slots = [slot for step in range(5) for slot in plan.step(step)]
    assert {slot.epoch for slot in slots} == {0}
    assert len({(slot.window, slot.micro_batch) for slot in slots}) == 20


def test_every_world_size_gives_the_same_slots():
    rng = random.Random(4)
    for _ in range(60):
        plan = random_plan(rng)
        world = rng.choice([1, 2, 3, 8, 64])
        start, stop = sorted(rng.sample(range(100), 2))
        assert_dealt(plan, world, start, stop)


@pytest.mark.parametrize("world", [7, 300, 1024])
def test_many_slots_over_many_workers(world):
    assert_dealt(random_plan(random.Random(world), slots=300), world, 15, 33)


def assert_dealt(plan, world, start, stop):
    expected = [slot for step in range(start, stop) for slot in plan.step(step)]
    assert len(expected) == (stop - start) * plan.slots_per_step
    union, owner = [], {}
    for rank in range(world):
        for slot in plan.walk(start, stop, rank, world):
            union.append(slot)
            assert owner.setdefault((slot.source, slot.slot), rank) == rank
    assert sorted(union) == expected


def test_any_step_is_reached_alike_directly_and_in_order():
    rng = random.Random(6)
    for _ in range(60):
        plan = random_plan(rng)
        walked = list(plan.walk(0, 100, 0, 1))
        step = rng.randrange(100)
        fresh = Plan(plan.sources, plan.slots_per_step, plan.seed)
        assert fresh.step(step) == [slot for slot in walked if slot.step == step]
        served = Counter((slot.source, slot.slot) for slot in walked if slot.step < step)
        names = [source.name for source in plan.sources]
        assert fresh.served(step).tolist() == [
            [served[name, lane] for lane in range(plan.slots_per_step)] for name in names
        ]


def test_the_mixture_is_exact_at_every_step_of_the_plan():
    plan = Plan([PlannedSource("a", 0.9, [7]), PlannedSource("b", 0.1, [3])], 4, seed=0)
    for step in range(0, 1000, 25):
        share = Fraction(4 * step, 10)
        assert abs(int(plan.served(step)[1].sum()) - share) < 1
    lanes = plan.served(1000)[1]
    assert lanes.min() > 60, "the slots inside a step are not shuffled"


def test_windows_are_what_the_walk_opens():
    rng = random.Random(7)
    for _ in range(40):
        plan = random_plan(rng)
        keys = plan.windows(20, 60, rank=0, world=2)
        held = {}
        for slot in plan.walk(20, 60, rank=0, world=2):
            wanted = (slot.source, slot.slot, slot.epoch, slot.window)
            if held.get(wanted[:2]) != wanted:
                held[wanted[:2]] = wanted
                assert next(keys) == wanted
        assert list(islice(keys, 1)) == []


def test_the_fingerprint_follows_what_decides_the_slots():
    def fingerprint(weight=1.0, sizes=(2, 3), slots=4, seed=0):
        return Plan([PlannedSource("text", weight, sizes)], slots, seed).fingerprint

    changes = [{"weight": 2.0}, {"sizes": (3, 2)}, {"slots": 5}, {"seed": 1}]
    assert fingerprint() == fingerprint()
    assert len({fingerprint(), *(fingerprint(**change) for change in changes)}) == 5


def test_slots_do_not_change_between_versions(monkeypatch):
    """Golden: a change here makes every unfinished run unresumable."""
    monkeypatch.undo()  # the real block length belongs to the plan
    sources = [PlannedSource("a", 0.7, [4, 9, 1]), PlannedSource("b", [[0, 0], [900, 1]], [2, 2])]
    slots = Plan(sources, 4, seed=11).step(1000)
    assert [(s.source, s.epoch, s.window, s.micro_batch) for s in slots] == [
        ("b", 393, 1, 0),
        ("b", 410, 1, 1),
        ("a", 199, 1, 7),
        ("a", 152, 1, 5),
    ]
