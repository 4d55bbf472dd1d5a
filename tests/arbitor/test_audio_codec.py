"""Audio codes: clips stay recognisable, the same bits everywhere, the formula as written."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from arbitor import audio_codec
from arbitor.audio_codec import decode, encode, num_frames, reconstruction_error, spectral_distance

SECONDS = 3
TIME = np.arange(SECONDS * 16_000) / 16_000


def sine() -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * TIME)).astype(np.float32)


def speech() -> np.ndarray:
    """Vowels: the harmonics of a gliding voice under formants that change, with pauses."""
    pitch = 120 + 20 * np.sin(2 * np.pi * 0.7 * TIME)
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    vowels = np.array([(700, 1200, 2600), (300, 2300, 3000), (500, 900, 2400)])
    formants = vowels[(TIME * 2.5).astype(int) % 3].T
    wave = np.zeros_like(TIME)
    for harmonic in range(1, 40):
        resonance = sum(1 / (1 + ((harmonic * pitch - f) / 90) ** 2) for f in formants)
        wave += resonance * np.sin(harmonic * phase)
    return (0.5 * wave * (TIME % 0.4 < 0.3) / abs(wave).max()).astype(np.float32)


def music() -> np.ndarray:
    """Three chords struck in turn, six partials a note, dying away."""
    wave = np.zeros_like(TIME)
    for second, chord in enumerate(((262, 330, 392), (349, 440, 523), (392, 494, 587))):
        since = np.clip(TIME - second, 0, None)
        for note in chord:
            for partial in range(1, 7):
                wave += np.sin(2 * np.pi * note * partial * since) / partial * np.exp(-3 * since)
    return (0.5 * wave / abs(wave).max()).astype(np.float32)


CLIPS = {"sine": sine(), "speech": speech(), "music": music()}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_stays_recognisable_among_the_three(name):
    decoded = decode(encode(CLIPS[name]))
    assert decoded.dtype == np.float32 and len(decoded) == len(CLIPS[name])
    distances = {other: spectral_distance(decoded, clip) for other, clip in CLIPS.items()}
    own = distances.pop(name)
    assert own == pytest.approx(reconstruction_error(CLIPS[name]), abs=1e-6)
    assert own < 12
    assert min(distances.values()) > own + 6, (own, distances)


def test_the_codes_are_the_formula_in_float64():
    clip = CLIPS["music"][: 320 * 60 + 7]
    padded = np.pad(clip.astype(np.float64), (352, 1024))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    points = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82) / 2595) - 1)
    frequencies = np.arange(513) * 15.625
    triangles = [np.interp(frequencies, points[m : m + 3], [0, 1, 0]) for m in range(80)]
    expected = []
    for frame in range(61):
        window = padded[frame * 320 : frame * 320 + 1024] * hann
        power = abs(np.fft.rfft(window) / hann.sum()) ** 2
        levels = np.clip(10 * np.log10(np.array(triangles) @ power + 1e-30), -80, 0)
        angles = np.pi / 80 * (np.arange(80) + 0.5)
        c = [np.sum(levels * np.cos(j * angles)) * np.sqrt(2 / 80) for j in range(16)]
        first = 255 * (1 - c[0] / np.sqrt(2) / (-80 * np.sqrt(80)))
        expected.append([first, *(128 + np.array(c[1:]) / 1.5)])
    # Half a step of rounding, and the float32 error of levels near the floor.
    assert abs(encode(clip) - np.clip(expected, 0, 255)).max() < 0.55


def test_frames_cover_every_sample_and_blocks_leave_no_seam(monkeypatch):
    assert [num_frames(n) for n in (0, 1, 320, 321)] == [0, 1, 1, 2]
    assert encode(np.zeros(0, np.float32)).shape == (0, 16)
    assert decode(np.zeros((0, 16), np.uint8)).shape == (0,)
    clip = CLIPS["speech"][:12_345]
    whole = encode(clip)
    assert whole.shape == (39, 16) and whole.dtype == np.uint8
    monkeypatch.setattr(audio_codec, "FRAMES_PER_BLOCK", 7)
    np.testing.assert_array_equal(encode(clip), whole)


def test_silence_is_silent_and_loud_noise_keeps_its_loudness():
    assert not decode(encode(np.zeros(3200, np.float32))).any()
    noise = np.random.default_rng(0).uniform(-1, 1, 16_000).astype(np.float32)
    # The level of a band of noise errs by about 3 dB, which 16 coefficients smooth away.
    assert decode(encode(noise)).std() == pytest.approx(noise.std(), rel=0.15)
    assert reconstruction_error(noise) < 4


def test_the_bits_are_the_same_in_another_process_with_other_threads():
    program = (
        "import hashlib; from tests.arbitor.test_audio_codec import *;"
        "codes = encode(CLIPS['speech'][:8000]);"
        "print(hashlib.sha256(codes.tobytes() + decode(codes).tobytes()).hexdigest())"
    )
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    output = subprocess.run(
        [sys.executable, "-c", program], env=threads, capture_output=True, text=True, check=True
    )
    codes = encode(CLIPS["speech"][:8000])
    digest = hashlib.sha256(codes.tobytes() + decode(codes).tobytes()).hexdigest()
    assert output.stdout.strip() == digest
