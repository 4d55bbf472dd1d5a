"""The optimizer: exact sums over slots and workers, calibration, refusals; and that it learns."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from arbitor import gradient_sums, vq
from arbitor.batch import SlotBatch
from arbitor.checkpoint import load_checkpoint, save_checkpoint
from arbitor.errors import UserError
from arbitor.main import ARBModel, ModelConfig
from arbitor.optimizer import NonFiniteError, TernaryOptimizer, UpdateConfig
from arbitor.settings import build
from arbitor.trainer import SlotRunner, evaluate, train_step
from tests.arbitor.worker_threads import run_workers

TINY = ModelConfig(width=64, num_layers=1)
FULL = ModelConfig(
    width=64,
    num_layers=1,
    head_width=32,
    rotary_width=16,
    enable_attention=True,
    enable_vq=True,
    enable_graph=True,
    enable_moe=True,
    codebook_size=32,
)
HALTING = replace(FULL, enable_act=True)
VARIANTS = [
    {},
    {"rule": "bigint"},
    {"momentum_bits": 4},
    {"momentum_bits": 4, "latent_bits": 6},
    {"group_size": 32},
]
STACKS = [(TINY, options) for options in VARIANTS]
STACKS += [
    (FULL, {}),
    (HALTING, {"momentum_bits": 4, "latent_bits": 6}),
    (FULL, {"rule": "bigint"}),
]

ALPHABET = 12


def make_batch(step, slot, length=64, sequences=4):
    """Made-up text of the second order: two symbols say what comes next in 85 % of the cases."""
    random = np.random.default_rng([step, slot])
    successor = np.random.default_rng(7).integers(0, ALPHABET, (ALPHABET, ALPHABET))
    symbols = random.integers(0, ALPHABET, (sequences, length + 1))
    follows = random.random(symbols.shape) < 0.85
    for t in range(2, length + 1):
        said = successor[symbols[:, t - 2], symbols[:, t - 1]]
        symbols[:, t] = np.where(follows[:, t], said, symbols[:, t])
    symbols = symbols.astype(np.uint16)
    return SlotBatch.from_symbols(symbols, step=step, slot=slot, source="text", modality="text")


@functools.cache
def entropies():
    """Nats per symbol of unigrams, and of bigrams (one symbol known), counted in 400 slots."""
    counts = np.zeros((ALPHABET, ALPHABET))
    for slot in range(400):
        batch = make_batch(10**6, slot)
        np.add.at(counts, (batch.symbols_BT.flatten(), batch.targets_BT.flatten()), 1)
    joint = counts / counts.sum()
    alone = joint.sum(axis=0)
    conditional = joint / joint.sum(axis=1, keepdims=True)
    bigrams = -(joint[joint > 0] * np.log(conditional[joint > 0])).sum()
    return float(-(alone * np.log(alone)).sum()), float(bigrams)


def make_optimizer(model, slots=4, steps=20, all_reduce=None, **config):
    config = UpdateConfig(**{"warmup_steps": 4} | config)
    return TernaryOptimizer(
        model, config, total_steps=steps, slots_per_step=slots, seed=0, all_reduce=all_reduce
    )


def states_equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))


def train(model, optimizer, steps, slots):
    run_slot = SlotRunner(model, optimizer)
    for step in steps:
        train_step(run_slot, step, [make_batch(step, slot) for slot in slots])


def name_of(stack):
    parts = [key for key, value in vars(stack[0]).items() if key.startswith("enable") and value]
    return f"{len(parts)} parts, {stack[1]}"


@pytest.fixture(params=STACKS, ids=name_of)
def stack(request, monkeypatch):
    """Model and options of the update; idle codes are split at once, so that it happens."""
    monkeypatch.setattr(vq, "IDLE_STEPS", 1)
    monkeypatch.setattr(vq, "IDLE_CHOICES", 1)
    return request.param


def test_the_order_of_the_slots_does_not_matter(stack):
    config, options = stack
    models = [ARBModel(config, 0, UpdateConfig(**options)) for _ in range(2)]
    for model, slots in zip(models, ([0, 1, 2, 3], [2, 0, 3, 1]), strict=True):
        train(model, make_optimizer(model, **options), range(3), slots)
    assert states_equal(*models)


def workers_train(num_workers, config, options):
    """The models of workers that share 5 slots a step; a sixth worker has none."""

    def worker(rank, all_reduce):
        model = ARBModel(config, 0, UpdateConfig(**options))
        exchange = all_reduce if num_workers > 1 else None
        optimizer = make_optimizer(model, slots=5, all_reduce=exchange, **options)
        train(model, optimizer, range(3), range(rank, 5, num_workers))
        return model

    return run_workers(num_workers, worker)


def workers_end_alike(workers, config, options):
    (alone,) = workers_train(1, config, options)
    return all(
        states_equal(model, alone)
        for num_workers in workers
        for model in workers_train(num_workers, config, options)
    )


def test_one_and_two_workers_end_with_the_same_bits(stack):
    assert workers_end_alike([2], *stack)


def test_any_number_of_workers_and_buckets_ends_with_the_same_bits(monkeypatch):
    monkeypatch.setattr(gradient_sums, "BUCKET_BYTES", 1 << 14)
    assert workers_end_alike([3, 4, 6], HALTING, {})


def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits(stack, tmp_path):
    config, options = stack
    straight, stopped, resumed = (ARBModel(config, 0, UpdateConfig(**options)) for _ in range(3))
    train(straight, make_optimizer(straight, slots=2, **options), range(4), range(2))
    train(stopped, make_optimizer(stopped, slots=2, **options), range(2), range(2))
    folder = save_checkpoint(
        tmp_path, stopped.state_dict(), step=2, config={}, plan_fingerprint="", conditions={}
    )
    resumed.load_state_dict(load_checkpoint(folder)[1])
    train(resumed, make_optimizer(resumed, slots=2, **options), range(2, 4), range(2))
    assert states_equal(straight, resumed) and not states_equal(straight, stopped)


def test_the_state_of_the_parts_moves_once_a_step_and_is_in_the_checkpoint(monkeypatch):
    monkeypatch.setattr(vq, "IDLE_STEPS", 1)
    monkeypatch.setattr(vq, "IDLE_CHOICES", 1)
    model = ARBModel(FULL, 0)
    optimizer, integers = make_optimizer(model, slots=2), ("usage", "score", "balance_bias")
    run_slot = SlotRunner(model, optimizer)

    def state():
        return {n: t.clone() for n, t in model.state_dict().items() if n.endswith(integers)}

    for step in range(3):
        before = state()
        assert len(before) == 3
        for slot in range(2):
            run_slot(step, make_batch(step, slot))
            evaluate(model, [make_batch(10**6, 0)])  # counts nothing
        assert all(torch.equal(before[name], now) for name, now in state().items())
        report = optimizer.step(step)
        assert all(not torch.equal(before[name], now) for name, now in state().items())
    positions = 2 * 4 * 64
    assert model.vq_bridge.usage.sum() <= 3 * 64 * positions
    assert 1 < report.parts["vq/perplexity"] <= 32 and report.parts["loop/rounds"] == 2
    assert report.parts["vq/splits"] > 0 and report.parts["graph/edges_per_code"] > 1


def test_a_weight_without_gradient_is_left_alone_and_calibrates_later():
    model = ARBModel(TINY, seed=0)
    optimizer = make_optimizer(model)
    head = model.byte_head.projection
    before = head.state().latent.clone()
    loss = model(make_batch(0, 0))
    loss.backward()
    head.slot_gradient = None
    optimizer.add_slot(0, 0, loss)
    optimizer.step(0)
    assert head.num_updates.item() == 0 and torch.equal(head.latent, before)
    train_step(SlotRunner(model, optimizer), 1, [make_batch(1, slot) for slot in range(4)])
    assert head.num_updates.item() == 1
    assert model.text_encoder.embedding.num_updates.item() == 2


def test_a_weight_waits_for_a_gradient_that_gives_it_exponents_and_is_counted():
    model = ARBModel(TINY, seed=0)
    optimizer = make_optimizer(model)
    for step, waiting in enumerate([1, 0]):
        loss = model(make_batch(step, 0))
        loss.backward()
        model.byte_head.projection.slot_gradient *= 1 if step else 2.0**-60
        optimizer.add_slot(step, 0, loss)
        assert optimizer.step(step).parts["ternary/untrained_weights"] == waiting
        assert model.byte_head.projection.num_updates == 1 - waiting


@pytest.mark.parametrize("step", [0, 1], ids=["first", "second"])
def test_a_gradient_that_is_not_finite_stops_the_step_before_anything_moves(step):
    model = ARBModel(TINY, seed=0)
    optimizer = make_optimizer(model)
    if step:
        train_step(SlotRunner(model, optimizer), 0, [make_batch(0, slot) for slot in range(4)])
    before = [buffer.clone() for buffer in model.buffers()]
    loss = model(make_batch(step, 0))
    loss.backward()
    model.trunk[0].feed_forward.down.slot_gradient[3, 5] = torch.nan
    optimizer.add_slot(step, 0, loss)
    with pytest.raises(NonFiniteError, match=f"step {step}: 1 gradient entries"):
        optimizer.step(step)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_a_loss_that_is_not_finite_names_the_slot():
    model = ARBModel(TINY, seed=0)
    optimizer = make_optimizer(model)
    optimizer.add_slot(0, 2, torch.tensor(float("inf")))
    with pytest.raises(NonFiniteError, match="step 0: the loss of slot 2 is inf"):
        optimizer.step(0)


def test_schedule_warms_up_and_ends_at_the_floor():
    config = UpdateConfig(warmup_steps=10, final_factor=0.1)
    factors = [config.schedule(step, 1000) / 65536 for step in range(1000)]
    assert factors[0] == pytest.approx(0.1, abs=1e-4) and max(factors) == max(factors[8:12])
    assert factors[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


def learn(steps, config=TINY, **options):
    """The model before and after, and its held-out loss."""
    start, model = (ARBModel(config, 0, UpdateConfig(**options)) for _ in range(2))
    train(model, make_optimizer(model, slots=2, steps=steps, **options), range(steps), range(2))
    return start, model, evaluate(model, [make_batch(10**6, slot) for slot in range(8)])["loss"]


def trit_pairs(start, model):
    """The trits of all weights before and after."""
    pairs = zip(start.ternary_weights(), model.ternary_weights(), strict=True)
    return [(before.trits(), after.trits()) for (_, before), (_, after) in pairs]


def test_trits_change_sign_and_learn_beyond_bigrams_as_frozen_ones_do_not():
    """The suite's proof that the rule learns; the scales alone do not get there."""
    start, model, loss = learn(150)
    pairs = trit_pairs(start, model)
    assert sum(int(((before == 1) & (after == -1)).sum()) for before, after in pairs) > 100
    assert sum(int(((before == -1) & (after == 1)).sum()) for before, after in pairs) > 100
    start, model, frozen = learn(150, latent_rate=0.0)
    assert all(torch.equal(*pair) for pair in trit_pairs(start, model))
    assert loss < entropies()[1] - 0.2
    assert loss < frozen - 0.1


PARTS = {
    "vq": {"enable_vq": True},
    "graph": {"enable_vq": True, "enable_graph": True},
    "halting": {"enable_moe": True, "enable_act": True},
    "all": {"enable_vq": True, "enable_graph": True, "enable_moe": True},
}


@pytest.mark.parametrize("parts", PARTS)
def test_the_parts_learn_beyond_bigrams(parts):
    _, _, loss = learn(60, replace(TINY, codebook_size=32, **PARTS[parts]))
    assert loss < entropies()[1] - 0.2


@pytest.mark.parametrize("options", VARIANTS[2:], ids=str)
def test_state_options_learn_beyond_bigrams_too(options):
    _, _, loss = learn(80, **options)
    assert loss < entropies()[1] - 0.2


def test_the_bigint_rule_learns_beyond_unigrams_and_moves_no_trit():
    start, model, loss = learn(100, rule="bigint")
    assert all(torch.equal(*pair) for pair in trit_pairs(start, model))
    assert loss < entropies()[0] - 0.2
    counters = {int(weight.step_counter) for _, weight in model.ternary_weights()}
    assert counters == {200}


def test_a_gradient_that_is_not_finite_stops_the_bigint_rule_too():
    model = ARBModel(TINY, 0, UpdateConfig(rule="bigint"))
    optimizer = make_optimizer(model, rule="bigint")
    loss = model(make_batch(0, 0))
    loss.backward()
    model.trunk[0].feed_forward.down.slot_gradient[3, 5] = torch.inf
    optimizer.add_slot(0, 0, loss)
    with pytest.raises(NonFiniteError, match="step 0: 1 gradient entries"):
        optimizer.step(0)
    assert not any(weight.corr_accum.any() for _, weight in model.ternary_weights())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rule": "adam"}, "update.rule: expected one of latent, bigint, got 'adam'"),
        ({"group_size": 12}, "update.group_size: expected one of 0, 16, 32, 64 under latent"),
        ({"rule": "bigint", "group_size": -1}, "update.group_size: expected 0 to 4096 under big"),
        ({"momentum_bits": 5}, "update.momentum_bits: expected 8 or 4, got 5"),
        ({"latent_bits": 4}, "update.latent_bits: expected 8 or 6, got 4"),
        ({"rule": "bigint", "latent_bits": 6}, "update.latent_bits: the rule bigint has none"),
        ({"rule": "bigint", "latent_rate": 21}, "update.latent_rate: expected 0 to 20"),
    ],
)
def test_an_update_that_cannot_be_made_names_the_key(values, message):
    with pytest.raises(UserError, match=message):
        build(UpdateConfig, values, "update")
