"""Sound as codes and back, without a learned part: 50 frames of 16 bytes a second of 16 kHz mono.

Frame t describes the 64 ms around sample 320 t + 160:

    spectrum  p[k] = |rfft(hann * x)[k] / sum(hann)|^2, k = 0..512
    levels    L[m] = 10 log10(sum over k of triangle[m, k] p[k]), cut to -80..0 dB; 80 mel bands
    cepstrum  c = the first 16 coefficients of the orthonormal discrete cosine transform of L
    codes     c[0] -> 0..255 over [-80 sqrt(80), 0];  c[j] -> 128 + round(c[j] / 1.5 dB)

A sine of full scale is at -4 dB. A floor below -80 dB would cost loudness: smoothing a lone peak
in dB lowers it the more, the deeper the floor around it. So bounded, c[0] cannot leave its range;
c[j] could reach +-322, with half of the bands at either bound, but speech, music and noise stay
within +-192: what is beyond is cut. A level then carries 0.2 dB of rounding; most of the error,
some dB, is what 16 coefficients leave out of a spectrum (harmonics above all), and the phase, for
which `decode` finds another (Griffin-Lim). n samples make ceil(n / 320) frames: every sample is in
one, and silence pads the last.

Shape letters: F frames, S samples of a frame, K frequencies, M mel bands, C codes of a frame.
"""

from collections.abc import Iterator

import numpy as np

SAMPLING_RATE = 16_000
HOP = 320
NUM_CODES = 16
NUM_LEVELS = 256  # of each code
FRAMES_PER_SECOND = SAMPLING_RATE // HOP

WINDOW = 1024
NUM_BANDS = 80
FLOOR_DB = -80.0
STEP = 1.5
FRAMES_PER_BLOCK = 512  # stays in the processor's cache, whatever the length of a clip

ROUNDS = 32  # of Griffin-Lim; the error falls little after it
MOMENTUM = 0.99  # Perraudin, Balazs and Sondergaard, "A fast Griffin-Lim algorithm" (2013)


def num_frames(num_samples: int) -> int:
    return -(-num_samples // HOP)


def encode(waveform: np.ndarray) -> np.ndarray:
    """float32 [n] at 16 kHz, within -1..1 -> uint8 [ceil(n / 320), 16].

    The same bits in every process on one machine: no sum is left to a matrix library.
    """
    levels = _levels(waveform)
    cepstrum = np.einsum("fm,mc->fc", levels, COSINES_MC)
    codes = np.rint(cepstrum / STEP) + 128
    codes[:, 0] = np.rint(255 * (1 - cepstrum[:, 0] / MEAN_RANGE))
    return np.clip(codes, 0, 255).astype(np.uint8)


def decode(codes: np.ndarray) -> np.ndarray:
    """uint8 [F, 16] -> float32 [320 F] at 16 kHz, within -1..1; the same codes, the same sound."""
    if not len(codes):
        return np.zeros(0, np.float32)
    cepstrum = (codes.astype(np.float32) - 128) * np.float32(STEP)
    cepstrum[:, 0] = (1 - codes[:, 0] / np.float32(255)) * MEAN_RANGE
    levels = np.einsum("fc,mc->fm", cepstrum, COSINES_MC)
    return _griffin_lim(_magnitudes(levels))


def spectral_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference in dB of the mel levels of two waveforms, over the shorter."""
    samples = min(len(a), len(b))
    return float(np.sqrt(np.mean((_levels(a[:samples]) - _levels(b[:samples])) ** 2)))


def reconstruction_error(waveform: np.ndarray) -> float:
    """What coding loses: the spectral distance in dB from a waveform to its decoded codes."""
    return spectral_distance(waveform, decode(encode(waveform)))


def _levels(waveform: np.ndarray) -> np.ndarray:
    """float32 [n] -> float32 [F, M] in dB, FLOOR_DB..0."""
    levels = np.empty((num_frames(len(waveform)), NUM_BANDS), np.float32)
    for part, frames_FS in _blocks(waveform):
        spectrum = np.fft.rfft(frames_FS * HANN)[:, :-1]
        power_FK = spectrum.real**2 + spectrum.imag**2
        rising = np.add.reduceat(power_FK * RISING_K, SEGMENT_STARTS, axis=1)
        falling = np.add.reduceat(power_FK * (1 - RISING_K), SEGMENT_STARTS, axis=1)
        levels[part] = 10 * np.log10(rising[:, :-1] + falling[:, 1:] + np.float32(1e-30))
    return np.clip(levels, FLOOR_DB, 0, out=levels)


def _blocks(waveform: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(frames' slice, float32 [F, S]), block by block; silence around the waveform."""
    frames = num_frames(len(waveform))
    for first in range(0, frames, FRAMES_PER_BLOCK):
        count = min(FRAMES_PER_BLOCK, frames - first)
        begin = first * HOP - MARGIN
        padded = np.zeros((count - 1) * HOP + WINDOW, np.float32)
        piece = waveform[max(0, begin) : begin + len(padded)]
        offset = max(0, -begin)
        padded[offset : offset + len(piece)] = piece
        windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)
        yield slice(first, first + count), windows[::HOP]


def _magnitudes(levels: np.ndarray) -> np.ndarray:
    """float32 [F, M] in dB -> [F, K]: the power of a band spread over its bins, in dB linearly."""
    density = np.pad(levels - BAND_WIDTH_DB, ((0, 0), (1, 1)), mode="edge")
    density_FK = (1 - RISING_K) * density[:, SEGMENT_K] + RISING_K * density[:, SEGMENT_K + 1]
    audible = levels.max(axis=1, keepdims=True) > FLOOR_DB + 1
    magnitudes = np.where(audible, 10 ** (density_FK / 20), 0)
    return np.pad(magnitudes, ((0, 0), (0, 1))).astype(np.float32)


def _griffin_lim(magnitudes_FK: np.ndarray) -> np.ndarray:
    """float32 [320 F] of spectra near the magnitudes; the first phases are random, always alike."""
    words = np.random.Philox(key=0).random_raw(magnitudes_FK.size)
    angles = (words >> 40).astype(np.float32) * np.float32(2 * np.pi / (1 << 24))
    spectra = magnitudes_FK * np.exp(1j * angles.reshape(magnitudes_FK.shape))
    before = np.zeros_like(spectra)
    for _ in range(ROUNDS):
        consistent = _spectra(_overlap_add(spectra))
        ahead = consistent + MOMENTUM * (consistent - before)
        spectra = magnitudes_FK * (ahead / np.maximum(np.abs(ahead), 1e-12))
        before = consistent
    waveform = _overlap_add(spectra)[MARGIN : MARGIN + len(magnitudes_FK) * HOP]
    return np.clip(waveform, -1, 1).astype(np.float32)


def _spectra(padded: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP]
    return np.fft.rfft(windows * HANN)


def _overlap_add(spectra_FK: np.ndarray) -> np.ndarray:
    """The waveform, MARGIN samples around it included, that is nearest to the spectra."""
    pieces = np.fft.irfft(spectra_FK, WINDOW) * HANN
    total = np.zeros((len(pieces) - 1) * HOP + WINDOW, pieces.dtype)
    weight = np.full_like(total, 1e-9)
    for i, piece in enumerate(pieces):
        total[i * HOP : i * HOP + WINDOW] += piece
        weight[i * HOP : i * HOP + WINDOW] += HANN**2
    return total / weight


def _mel_segments() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts of the 81 segments between band centres; each bin's segment; its rise within, 0..1.

    Band m rises through segment m and falls through segment m + 1. Centres are even on the scale
    2595 log10(1 + f / 700 Hz) (O'Shaughnessy 1987); each segment has at least one bin.
    """
    top = 2595 * np.log10(1 + SAMPLING_RATE / 2 / 700)
    points = 700 * (10 ** (np.linspace(0, top, NUM_BANDS + 2) / 2595) - 1)
    frequencies = np.arange(WINDOW // 2) * (SAMPLING_RATE / WINDOW)
    segment = np.searchsorted(points, frequencies, side="right") - 1
    rising = (frequencies - points[segment]) / (points[segment + 1] - points[segment])
    starts = np.searchsorted(segment, np.arange(NUM_BANDS + 1))
    return starts, segment, rising.astype(np.float32)


def _cosines() -> np.ndarray:
    """The first 16 columns of the orthonormal DCT-II."""
    angles = np.pi / NUM_BANDS * np.outer(np.arange(NUM_BANDS) + 0.5, np.arange(NUM_CODES))
    basis = np.cos(angles) * np.sqrt(2 / NUM_BANDS)
    basis[:, 0] = np.sqrt(1 / NUM_BANDS)
    return basis.astype(np.float32)


MARGIN = (WINDOW - HOP) // 2
HANN = np.float32(0.5) - np.float32(0.5) * np.cos(
    2 * np.pi / WINDOW * np.arange(WINDOW), dtype=np.float32
)
HANN /= HANN.sum()
SEGMENT_STARTS, SEGMENT_K, RISING_K = _mel_segments()
BAND_WIDTH_DB = 10 * np.log10(
    np.add.reduceat(RISING_K, SEGMENT_STARTS)[:-1]
    + np.add.reduceat(1 - RISING_K, SEGMENT_STARTS)[1:]
)
COSINES_MC = _cosines()
MEAN_RANGE = np.float32(FLOOR_DB * np.sqrt(NUM_BANDS))  # c[0] of a frame at the floor throughout
