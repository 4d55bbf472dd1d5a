"""The formulas of the integer update in plain Python integers, one weight at a time."""

import math

import torch

from arbitor.kernel.latent_update import fixed_point as fp


def log2_int(x: int) -> int:
    return int(fp.ilog2(torch.tensor(x)))


def shifted(x: int, places: int) -> int:
    return x << places if places >= 0 else x >> -places


def clamp(x: int, low: int, high: int) -> int:
    return max(low, min(high, x))


def plain_update(
    state, grad_sum, slot_format, rates, key, momentum_bits=8, latent_bits=8
) -> dict[str, list]:
    """Every tensor of the state after one update, by the formulas of the specification."""
    N, K = state.latent.shape
    G, a, m = grad_sum.tolist(), state.latent.tolist(), state.momentum.tolist()
    me, R, C = (x.tolist() for x in (state.momentum_exponent, state.row_moment, state.col_moment))
    # Latents count in steps of 4 where they have 6 bits.
    step = {8: 1, 6: 4}[latent_bits]
    largest, largest_m = {8: 127, 6: 31}[latent_bits], {8: 127, 4: 7}[momentum_bits]
    T, V, E = int(state.tensor_moment), state.scale_moment.tolist(), state.log2_scale.tolist()
    t = int(state.num_updates) + 1
    gb = (slot_format.slots_per_step * slot_format.qmax).bit_length()
    fraction = 21 - gb
    memory = min(243, 256 * (t - 1) // t)
    bias = round(-256 * math.log2(1 - (230 / 256) ** t))
    e = [clamp(slot_format.r0 - ((r + 128) >> 8), -100, 100) for r in R]
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
            places = clamp(me[i][g // 64] + e[i] + fraction, -31, {8: 15, 4: 19}[momentum_bits])
            X = {j: shifted(230 * m[i][j], places) + 26 * (G[i][j] << fraction) for j in lanes}
            peak = max(abs(x) for x in X.values())
            assert peak < 1 << 30
            s = max(0, peak.bit_length() - largest_m.bit_length())
            exponent = clamp(s - (e[i] + fraction + 8), -128, 127) if peak else -128
            new_me.append(exponent)
            for j in lanes:
                noise = fp.mix(((i * K + j) ^ key) & 0xFFFFFFFF)
                high, low = noise >> 16, noise % (65536 * step)
                new_m.append(clamp((X[j] + shifted(high, s - 16)) >> s, -largest_m, largest_m))
                xi = T - R[i] + rates.log2_latent_rate + bias
                zeta = -C[j]
                P = new_m[-1] * int(fp.POW2_Q11[xi & 255]) * int(fp.POW2_Q11[zeta & 255])
                assert abs(P) < 1 << 31
                places = clamp(clamp(6 - ((xi >> 8) + exponent), -64, 64) - (zeta >> 8), 0, 31)
                D = clamp(P >> places, -rates.max_latent_step, rates.max_latent_step)
                code = a[i][j] // step - (D + low) // (65536 * step)
                new_a.append(step * clamp(code, -largest, largest))
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
