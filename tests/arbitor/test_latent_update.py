"""The integer update rule against its formulas in plain Python and against the float rule."""

import copy
import math
from dataclasses import fields

import pytest
import torch

from arbitor.kernel.latent_update import fixed_point as fp
from arbitor.kernel.latent_update import reference as rule

RATES = rule.step_rates(3 << 16, round(2.56 * 65536))
SHAPES = [(1, 1), (1, 200), (63, 5), (65, 63), (70, 192), (33, 320), (1000, 129)]


def random_gradient(num_rows: int, num_cols: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of very different sizes, about 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp2(torch.randn(num_rows, 1, generator=generator))
    cols = torch.exp2(torch.randn(num_cols, generator=generator))
    return torch.randn(num_rows, num_cols, generator=generator) * rows * cols * 1e-4


def fresh_state(num_rows: int, num_cols: int, grads: list[torch.Tensor]) -> rule.TernaryState:
    state = rule.init_state(num_rows, num_cols, 1.0, seed=1, name="w")
    assert rule.calibrate(state, sum(rule.quantize_exact(grad) for grad in grads))
    return state


def slot_sum(state, grads, fmt, step=0) -> torch.Tensor:
    exponent = rule.row_exponents(state.row_moment, fmt)
    total = torch.zeros(grads[0].shape, dtype=fmt.sum_dtype)
    for slot, grad in enumerate(grads):
        key = rule.stream_key(1, step, 7, fp.STREAM_SLOT + slot)
        total += rule.quantize_slot(grad, exponent, fmt, key)[0]
    return total


def step_on(state, grads, fmt, step=0, rates=RATES) -> rule.UpdateStats:
    key = rule.stream_key(1, step, 7, fp.STREAM_UPDATE)
    return rule.update(state, slot_sum(state, grads, fmt, step), fmt, rates, key)


def assert_equal_states(left, right):
    for field in fields(left):
        assert torch.equal(getattr(left, field.name), getattr(right, field.name)), field.name


# ---- the same formulas in plain Python integers, one weight at a time ---------------------------


def log2_int(x: int) -> int:
    return int(fp.ilog2(torch.tensor(x)))


def shifted(x: int, places: int) -> int:
    return x << places if places >= 0 else x >> -places


def clamp(x: int, low: int, high: int) -> int:
    return max(low, min(high, x))


def plain_update(state, grad_sum, fmt, rates, key) -> dict[str, list]:
    """Every tensor of the state after one update, by the formulas of the specification."""
    N, K = state.latent.shape
    G, a, m = grad_sum.tolist(), state.latent.tolist(), state.momentum.tolist()
    me, R, C = (x.tolist() for x in (state.momentum_exponent, state.row_moment, state.col_moment))
    T, V, E = int(state.tensor_moment), state.scale_moment.tolist(), state.log2_scale.tolist()
    t = int(state.num_updates) + 1
    gb = (fmt.slots_per_step * fmt.qmax).bit_length()
    fraction = 21 - gb
    memory = min(243, 256 * (t - 1) // t)
    bias = round(-256 * math.log2(1 - (230 / 256) ** t))
    e = [clamp(fmt.r0 - ((r + 128) >> 8), -100, 100) for r in R]
    column_shift = max(0, 62 - 2 * gb - (N * K - 1).bit_length())

    def moment(old, x, stream, index):
        noise = fp.mix(index ^ fp.substream_key(key, stream)) & 511
        ratio = clamp(x - (old << 9), -30 << 16, 24 << 16) >> 8
        power = int(fp.POW2_Q16[ratio & 255]) * (256 - memory)
        change = log2_int((memory << 16) + shifted(power, ratio >> 8)) - (24 << 16)
        return clamp(old + ((change + noise) >> 9), -32768, 32767)

    def trit(latent):
        return (latent > 21) - (latent < -21)

    after = {"latent": [], "momentum": [], "momentum_exponent": [], "row_moment": []}
    after |= {"scale_moment": [], "log2_scale": [], "col_moment": [], "tensor_moment": [T]}
    col_squares = [0] * K
    for i in range(N):
        new_a, new_m, new_me, scale_grad = [], [], [], 0
        for g in range(0, K, 64):
            lanes = range(g, min(g + 64, K))
            places = clamp(me[i][g // 64] + e[i] + fraction, -31, 15)
            X = {j: shifted(230 * m[i][j], places) + 26 * (G[i][j] << fraction) for j in lanes}
            peak = max(abs(x) for x in X.values())
            assert peak < 1 << 30
            s = max(0, peak.bit_length() - 7)
            exponent = clamp(s - (e[i] + fraction + 8), -128, 127) if peak else -128
            new_me.append(exponent)
            for j in lanes:
                noise = fp.mix(((i * K + j) ^ key) & 0xFFFFFFFF)
                high, low = noise >> 16, noise & 0xFFFF
                new_m.append(clamp((X[j] + shifted(high, s - 16)) >> s, -127, 127))
                xi = T - R[i] + rates.log2_latent_rate + bias
                zeta = -C[j]
                P = new_m[-1] * int(fp.POW2_Q11[xi & 255]) * int(fp.POW2_Q11[zeta & 255])
                assert abs(P) < 1 << 31
                places = clamp(clamp(6 - ((xi >> 8) + exponent), -64, 64) - (zeta >> 8), 0, 31)
                D = clamp(P >> places, -rates.max_latent_step, rates.max_latent_step)
                new_a.append(clamp(a[i][j] - ((D + low) >> 16), -127, 127))
                scale_grad += X[j] * trit(a[i][j])
                col_squares[j] += (G[i][j] ** 2 << column_shift) >> min(62, 2 * (e[i] - min(e)))
        after["latent"].append(new_a)
        after["momentum"].append(new_m)
        after["momentum_exponent"].append(new_me)
        row_squares = sum(x * x for x in G[i])
        x = log2_int(row_squares) - log2_int(K) - (2 * e[i] << 16)
        after["row_moment"].append(moment(R[i], x, 2, i) if row_squares else R[i])

        lg = log2_int(abs(scale_grad)) - ((e[i] + fraction + 8) << 16)
        first = clamp((lg + 128) >> 8, -32768, 32767)
        after["scale_moment"].append(first if t == 1 else moment(V[i], 2 * lg, 4, i))
        ratio = lg + (bias << 8) - (after["scale_moment"][i] << 8)
        ratio = clamp(ratio, -20 << 16, 2 << 16) >> 8
        u = min(3 << 16, shifted(int(fp.POW2_Q16[ratio & 255]), ratio >> 8))
        u *= (scale_grad > 0) - (scale_grad < 0)
        dither = fp.mix(i ^ fp.substream_key(key, 5)) & 0xFFFF
        moved = ((u * rates.scale_step >> 16) + dither) >> 16
        after["log2_scale"].append(clamp(E[i] - moved, -32768, 32767))
    unit = (2 * min(e) + column_shift) << 16
    for j, total in enumerate(col_squares):
        x = log2_int(total) - log2_int(N) - unit
        after["col_moment"].append(moment(C[j], x, 3, j) if total else C[j])
    if total := sum(col_squares):
        x = log2_int(total) - log2_int(N) - log2_int(K) - unit
        after["tensor_moment"] = [moment(T, x, 6, 0)]
    return after


@pytest.mark.parametrize("slots", [4, 16, 17, 300])
@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (9, 63), (5, 65), (12, 192)])
def test_update_is_the_specification(monkeypatch, shape, slots):
    monkeypatch.setattr(fp, "BLOCK_ELEMENTS", 4 * shape[1])
    fmt = rule.slot_format(slots)
    grads = [random_gradient(*shape, seed) for seed in range(2)]
    grads[0][shape[0] // 2] *= 2.0**-24  # a row far below the rest: its columns' share is cut
    grads[1][shape[0] // 2] = 0
    state = fresh_state(*shape, grads)
    scales = [1.0, 1.0, 50.0, 0.0, 2.0**-12, 0.3]
    for step, scale in enumerate(scales):
        total = slot_sum(state, [grad * scale for grad in grads], fmt, step)
        key = rule.stream_key(1, step, 7, fp.STREAM_UPDATE)
        expected = plain_update(state, total, fmt, RATES, key)
        rule.update(state, total, fmt, RATES, key)
        for name, values in expected.items():
            assert getattr(state, name).tolist() == values, (name, step)


@pytest.mark.parametrize("slots", [4, 16, 17, 300])
def test_largest_sums_stay_in_range(slots):
    """Every integer at its bound: sums +-S qmax, momentum +-127 at the largest shift."""
    fmt = rule.slot_format(slots)
    state = fresh_state(3, 130, [random_gradient(3, 130)])
    signs = torch.where(random_gradient(3, 130) < 0, -1, 1)
    state.momentum.copy_(127 * signs)
    state.momentum_exponent.fill_(127)
    state.latent.copy_(127 * signs)
    total = (slots * fmt.qmax * signs).to(fmt.sum_dtype)
    expected = plain_update(state, total, fmt, RATES, 5)
    stats = rule.update(state, total, fmt, RATES, 5)
    for name, values in expected.items():
        assert getattr(state, name).tolist() == values, name
    assert stats.zeros == 0


# ---- against the float rule ---------------------------------------------------------------------


@pytest.mark.parametrize("slots", [4, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_step_is_the_float_rule_up_to_rounding(shape, slots):
    fmt = rule.slot_format(slots)
    grads = [random_gradient(*shape, seed) for seed in range(2)]
    state = fresh_state(*shape, grads)
    for step in range(4):
        before = copy.deepcopy(state)
        step_on(state, grads, fmt, step)
        compare_with_float_rule(before, state, slot_sum(before, grads, fmt, step), fmt)


def compare_with_float_rule(before, after, total, fmt):
    """lab/results.md section 2 in float64, from the integer state before."""
    t = int(after.num_updates)
    exponent = rule.row_exponents(before.row_moment, fmt).double().unsqueeze(1)
    grad = total.double() * torch.exp2(-exponent)
    weight = min(243, 256 * (t - 1) // t) / 256

    def rms(moment):
        return torch.exp2(moment.double() / 256)

    # Moments: one unit of stochastic rounding, half a unit from the ratio cut to 1/256 octave.
    for name, mean in (
        ("row_moment", grad.square().mean(1)),
        ("col_moment", grad.square().mean(0)),
        ("tensor_moment", grad.square().mean().reshape(1)),
    ):
        old = getattr(before, name)
        new = 128 * torch.log2(weight * rms(old).square() + (1 - weight) * mean)
        assert ((getattr(after, name) - new).abs()[mean > 0] < 1.6).all(), name

    def momentum(state):
        unit = torch.exp2(state.momentum_exponent.double()).repeat_interleave(64, dim=1)
        return state.momentum * unit[:, : total.shape[1]], unit[:, : total.shape[1]]

    blended = 0.8984375 * momentum(before)[0] + 0.1015625 * grad
    stored, unit = momentum(after)
    # One unit of stochastic rounding and what the shift of the old momentum cut.
    cut = torch.exp2(-exponent - rule.fraction_bits(fmt) - 8)
    assert ((stored - blended).abs() <= unit + cut).all()

    bias = 1 - 0.8984375**t
    rows = rms(before.row_moment / 1).unsqueeze(1) / rms(before.tensor_moment)
    step = 3 * (stored / bias / (rows * rms(before.col_moment))).clamp(-3, 3)
    target = (before.latent - step).clamp(-127, 127)
    # One latent of stochastic rounding; 0.4 % for exponents in 1/256 octave and 11-bit powers.
    assert ((after.latent - target).abs() < 1 + 0.004 * step.abs()).all()

    scale_grad = (blended * rule.trits(before.latent)).sum(1)
    normalized = (scale_grad.abs() / bias / rms(after.scale_moment)).clamp(max=3)
    target = before.log2_scale - 2.56 * normalized * scale_grad.sign()
    # Likewise; a sum that cancels keeps the error of the cut above.
    noise = cut.squeeze(1) * total.shape[1] / bias / rms(after.scale_moment)
    assert ((after.log2_scale - target).abs() < 1.04 + 2.56 * noise).all()


def test_latents_move_without_bias():
    """Over many weights the mean movement is the mean step, not only up to one latent."""
    fmt = rule.slot_format(4)
    state = fresh_state(256, 256, [torch.full((256, 256), 1e-4)])
    before = state.latent.double().clamp(-120, 120)
    state.latent.copy_(before)
    step_on(state, [torch.full((256, 256), 1e-4)], fmt, rates=rule.step_rates(20000, 0))
    moved = (before - state.latent).mean()
    assert abs(moved - 20000 / 65536) < 0.004 * 0.3 + 4 * 0.46 / 256


# ---- exactness ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [4, 17])
def test_order_and_split_of_slots_do_not_matter(slots):
    fmt = rule.slot_format(slots)
    grads = [random_gradient(33, 320, seed) for seed in range(4)]
    state = fresh_state(33, 320, grads)
    exponent = rule.row_exponents(state.row_moment, fmt)
    integers = [rule.quantize_slot(grad, exponent, fmt, 8 + s)[0] for s, grad in enumerate(grads)]
    sums = [
        integers[0] + integers[1] + integers[2] + integers[3],
        integers[3] + integers[1] + integers[0] + integers[2],
        (integers[2] + integers[0]).int() + (integers[1] + integers[3]).int(),
    ]
    states = [copy.deepcopy(state) for _ in sums]
    for copied, total in zip(states, sums, strict=True):
        rule.update(copied, total, fmt, RATES, 9)
    assert_equal_states(states[0], states[1])
    assert_equal_states(states[0], states[2])


def test_blocks_and_threads_do_not_change_the_state(monkeypatch):
    fmt = rule.slot_format(17)
    grads = [random_gradient(70, 193, seed) for seed in range(2)]
    states = []
    threads = torch.get_num_threads()
    for block_elements, num_threads in ((1 << 17, 1), (1 << 17, 2), (1, 2), (1000, 1)):
        monkeypatch.setattr(fp, "BLOCK_ELEMENTS", block_elements)
        torch.set_num_threads(num_threads)
        states.append(fresh_state(70, 193, grads))
        for step in range(3):
            step_on(states[-1], grads, fmt, step)
    torch.set_num_threads(threads)
    for other in states[1:]:
        assert_equal_states(states[0], other)


# ---- awkward gradients --------------------------------------------------------------------------


def test_rows_and_columns_without_gradient_keep_their_moments():
    fmt = rule.slot_format(4)
    grad = random_gradient(70, 192)
    grad[3], grad[:, 7] = 0, 0
    state = fresh_state(70, 192, [grad])
    assert state.row_moment[3] == state.row_moment.max() - 1024
    assert state.col_moment[7] == state.col_moment.max() - 1024
    before = copy.deepcopy(state)
    step_on(state, [grad], fmt)
    assert state.row_moment[3] == before.row_moment[3]
    assert state.col_moment[7] == before.col_moment[7]
    assert torch.equal(state.latent[3], before.latent[3])
    assert torch.equal(state.latent[:, 7], before.latent[:, 7])
    assert state.log2_scale[3] == before.log2_scale[3]


def test_an_all_zero_step_keeps_every_moment_and_shrinks_momentum():
    fmt = rule.slot_format(4)
    grad = random_gradient(70, 192)
    state = fresh_state(70, 192, [grad])
    step_on(state, [grad], fmt)
    before = copy.deepcopy(state)
    step_on(state, [torch.zeros_like(grad)], fmt, step=1)
    for name in ("row_moment", "col_moment", "tensor_moment"):
        assert torch.equal(getattr(state, name), getattr(before, name))

    def size(state):
        unit = torch.exp2(state.momentum_exponent.double()).repeat_interleave(64, dim=1)
        return float((state.momentum * unit).abs().mean())

    assert size(state) == pytest.approx(0.8984375 * size(before), rel=1e-3)


def test_calibration_of_a_zero_gradient_changes_nothing():
    state = rule.init_state(4, 5, 1.0, seed=0, name="w")
    before = copy.deepcopy(state)
    assert not rule.calibrate(state, torch.zeros(4, 5, dtype=torch.int64))
    assert_equal_states(state, before)


@pytest.mark.parametrize("shape", [*SHAPES, (40, 30)])
def test_calibration_is_the_rms_of_the_sum(shape):
    grad = random_gradient(*shape).double()
    if shape == (40, 30):
        grad[0] *= 1e7
    state = fresh_state(*shape, [grad.float()])
    for moment, mean in (
        (state.row_moment, grad.square().mean(1)),
        (state.col_moment, grad.square().mean(0)),
        (state.tensor_moment, grad.square().mean()),
    ):
        assert ((moment - 128 * torch.log2(mean)).abs() < 0.6).all()


def test_a_spike_moves_latents_no_further_than_the_clip():
    fmt = rule.slot_format(4)
    grad = random_gradient(70, 192)
    state = fresh_state(70, 192, [grad])
    for step in range(3):
        step_on(state, [grad], fmt, step)
    before = copy.deepcopy(state)
    step_on(state, [50 * grad], fmt, 3)
    moved = (state.latent.int() - before.latent.int()).abs()
    assert moved.max() == 9  # three rates of 3
    assert (state.row_moment > before.row_moment).all()
    assert ((state.log2_scale - before.log2_scale).abs() <= 8).all()  # 3 * 2.56, rounded


def test_huge_and_tiny_entries():
    fmt = rule.slot_format(4)
    grad = random_gradient(33, 320)
    state = fresh_state(33, 320, [grad])
    grad[0, 0], grad[1, 1], grad[2, 2] = 1e9, 1e-40, math.nan
    exponent = rule.row_exponents(state.row_moment, fmt)
    integers, nonfinite, clipped = rule.quantize_slot(grad, exponent, fmt, 0)
    assert (nonfinite, clipped) == (1, 1)
    assert integers[0, 0] == 2047 and integers[1, 1] == 0 and integers[2, 2] == 0
    expected = plain_update(state, integers, fmt, RATES, 3)
    rule.update(state, integers, fmt, RATES, 3)
    assert state.latent.tolist() == expected["latent"]


# ---- start, statistics, polarity ----------------------------------------------------------------


def test_initial_latents_are_normal_and_keyed():
    state = rule.init_state(500, 400, math.sqrt(2), seed=3, name="blocks.0.up")
    latent = state.latent.double()
    standard = 52.5 * math.sqrt(1 - 0.0396)  # clamped at 2.42 standard deviations
    assert abs(latent.mean()) < 4 * 52.5 / math.sqrt(latent.numel())
    assert abs(latent.std() - standard) < 0.5
    share = math.erf(21.5 / 52.5 / math.sqrt(2))
    assert abs((rule.trits(state.latent) == 0).double().mean() - share) < 4 * 0.5 / 447
    assert latent.min() == -127 and latent.max() == 127
    assert state.log2_scale.unique().tolist() == [round(128 * math.log2(2 / 400 / 0.69))]
    same = rule.init_state(500, 400, math.sqrt(2), seed=3, name="blocks.0.up")
    assert_equal_states(state, same)
    for seed, name in ((4, "blocks.0.up"), (3, "blocks.1.up")):
        assert not torch.equal(rule.init_state(500, 400, 1.0, seed, name).latent, state.latent)


def test_initial_thresholds_are_the_normal_distribution():
    for rank, threshold in enumerate(rule._normal_thresholds().tolist()):
        below = 0.5 * (1 + math.erf((rank - 126.5) / 52.5 / math.sqrt(2)))
        assert abs(threshold - 2**32 * below) < 2


def test_trits():
    latent = torch.tensor([-127, -22, -21, 0, 21, 22, 127], dtype=torch.int8)
    assert rule.trits(latent).tolist() == [-1, -1, 0, 0, 0, 1, 1]


def test_stats_count_the_state():
    grad = random_gradient(70, 193)
    state = fresh_state(70, 193, [grad])
    before = rule.trits(state.latent)
    for step in range(3):
        stats = step_on(state, [grad], rule.slot_format(4), step)
        after = rule.trits(state.latent)
        assert stats.flips == int((before != after).sum())
        assert stats.zeros == int((after == 0).sum())
        assert stats.saturated == int((state.latent.int().abs() == 127).sum())
        before = after


def weight_of(state) -> torch.Tensor:
    scale = torch.exp2(state.log2_scale.float() / 256)
    return scale.unsqueeze(1) * rule.trits(state.latent)


@pytest.mark.parametrize("slots", [4, 17])
def test_a_regression_is_learned(slots):
    fmt = rule.slot_format(slots)
    teacher = weight_of(rule.init_state(24, 100, 1.0, seed=8, name="teacher"))
    state = rule.init_state(24, 100, 0.5, seed=9, name="student")
    losses = []
    for step in range(120):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(slots * 4, 100, generator=generator)
        error = x @ (weight_of(state) - teacher).T
        losses.append(float(error.square().mean()))
        grads = [error[s::slots].T @ x[s::slots] / len(x) for s in range(slots)]
        if step == 0:
            rule.calibrate(state, sum(rule.quantize_exact(grad) for grad in grads))
        step_on(state, grads, fmt, step)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_latent_rate_of_zero_moves_scales_alone():
    grad = random_gradient(70, 192)
    state = fresh_state(70, 192, [grad])
    before = copy.deepcopy(state)
    # The gradient of a weight that should grow: every row scale must rise.
    grad = -rule.trits(state.latent) * 1e-4
    for step in range(5):
        stats = step_on(state, [grad], rule.slot_format(4), step, rule.step_rates(0, 167772))
        assert stats.flips == 0
    assert torch.equal(state.latent, before.latent)
    assert (state.log2_scale > before.log2_scale).all()
