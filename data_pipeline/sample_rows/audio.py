"""Sounds: FLAC clips of six kinds at three heights, with transcripts such as "a low rising tone".

A voice is the harmonics of a pitch under the formants of its vowels, a smaller throat the higher it
is, and says what its transcript spells: "a high voice says ah oo ee".
"""

import io

import numpy as np
import pyarrow as pa
import soundfile

from data_pipeline.sample_rows.media import balanced, interleaved, media_table, uniforms

COUNT = 540  # each kind and height 30 times
RATE = 16_000
LEVEL = 0.3
HEIGHTS = {"low": 1.0, "middle": 2.0, "high": 4.0}  # times the frequencies of the low one
VOWELS = {"ah": (730, 1090, 2440), "ee": (270, 2290, 3010), "oo": (300, 870, 2240)}
CHORD = (1.0, 1.25, 1.5)


def rows(times: int = 1) -> pa.Table:
    """`times` as many rows as the sample has."""
    clips = balanced(times * COUNT, interleaved(list(KINDS), list(HEIGHTS)), key="audio")
    sounds, transcripts = [], []
    for i, ((kind, height),) in enumerate(clips):
        chance = uniforms(8, "audio", i)
        time = np.arange(int(RATE * (1 + 0.5 * chance[0]))) / RATE
        sound, words = KINDS[kind](time, HEIGHTS[height] * (0.9 + 0.2 * chance[1]), chance[2:])
        sounds.append(_encode(_fade(sound)))
        transcripts.append(words.format(height=height))
    return media_table("audio", "flac", sounds, transcripts, sampling_rate=[RATE] * len(clips))


def _rising(time: np.ndarray, height: float, chance: np.ndarray) -> tuple[np.ndarray, str]:
    return _sweep(time, 200 * height, 500 * height), "a {height} rising tone"


def _falling(time: np.ndarray, height: float, chance: np.ndarray) -> tuple[np.ndarray, str]:
    return _sweep(time, 500 * height, 200 * height), "a {height} falling tone"


def _sweep(time: np.ndarray, start: float, end: float) -> np.ndarray:
    hertz = start + (end - start) * time / time[-1]
    return np.sin(2 * np.pi * np.cumsum(hertz) / RATE)


def _chord(time: np.ndarray, height: float, chance: np.ndarray) -> tuple[np.ndarray, str]:
    wave = np.zeros_like(time)
    for note in CHORD:
        for partial in range(1, 6):
            hertz = 150 * height * note * partial
            wave += np.sin(2 * np.pi * hertz * time) / partial * np.exp(-1.5 * partial * time)
    return wave, "a {height} chord dies away"


def _noise(time: np.ndarray, height: float, chance: np.ndarray) -> tuple[np.ndarray, str]:
    """Bursts in a band: white noise that carries a tone, smoothed over its period before."""
    bursts = 2 + int(3 * chance[0])
    white = uniforms(len(time), "noise", int(chance[1] * 2**32)) - 0.5
    width = int(RATE / (300 * height))
    smooth = np.convolve(white, np.hanning(width + 2), "same")
    gate = (time * bursts / time[-1]) % 1 < 0.5
    return smooth * np.cos(2 * np.pi * 600 * height * time) * gate, "bursts of {height} noise"


def _pulses(time: np.ndarray, height: float, chance: np.ndarray) -> tuple[np.ndarray, str]:
    """Clicks, more of them a second the higher."""
    since = (time * 6 * height + chance[0]) % 1 / (6 * height)
    return np.sin(2 * np.pi * 1500 * since) * np.exp(-since * 400), "a {height} train of clicks"


def _voice(time: np.ndarray, height: float, chance: np.ndarray) -> tuple[np.ndarray, str]:
    said = [list(VOWELS)[int(3 * value)] for value in chance[:3]]
    place = np.minimum((3 * time / time[-1]).astype(int), 2)
    formants = height**0.2 * np.array([VOWELS[vowel] for vowel in said])[place].T
    pitch = 90 * height**0.7 * (1 + 0.05 * np.sin(2 * np.pi * 3 * time))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    wave = np.zeros_like(time)
    for harmonic in range(1, 1 + int(4500 / pitch.max())):
        for formant, weight in zip(formants, (1, 0.5, 0.2), strict=True):
            resonance = weight / (1 + ((harmonic * pitch - formant) / 80) ** 2)
            wave += resonance * np.sin(harmonic * phase)
    pause = (3 * time / time[-1]) % 1 < 0.8
    return wave * pause, "a {height} voice says " + " ".join(said)


def _fade(sound: np.ndarray) -> np.ndarray:
    """Peak at LEVEL; no click at either end."""
    ramp = np.minimum(np.arange(len(sound)), np.arange(len(sound))[::-1]) / (0.01 * RATE)
    return LEVEL * sound / abs(sound).max() * np.minimum(ramp, 1)


def _encode(sound: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


KINDS = {
    "rising": _rising,
    "falling": _falling,
    "chord": _chord,
    "noise": _noise,
    "pulses": _pulses,
    "voice": _voice,
}
