"""Audio bytes to waveform and codes: WAV, FLAC, Ogg, MP3 by soundfile, resampled by soxr."""

import io
import math
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr

from arbitor.audio_codec import SAMPLING_RATE, encode, num_frames
from arbitor.errors import UserError
from data_pipeline.decode.content import ContentError, content_errors, validate_length

FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")
MAX_CHANNELS = 16
SAMPLING_RATES = range(4_000, 384_001)
STREAMED = 0x7FFF_0000  # bytes claimed by a WAV whose writer did not know its length


@dataclass(frozen=True)
class AudioConfig:
    """What becomes of a clip: BEGIN_AUDIO, at most `positions` frames, END_AUDIO, a transcript."""

    seconds_max: float = 4.0  # a longer clip is cut here
    sequence_length: int = 256  # positions of a row, transcript and specials included

    @property
    def samples(self) -> int:
        """Of the longest clip, at 16 kHz."""
        return math.ceil(self.seconds_max * SAMPLING_RATE)

    @property
    def positions(self) -> int:
        """The frames of the longest clip."""
        return num_frames(self.samples)

    def validate(self) -> None:
        if self.seconds_max <= 0:
            raise UserError(f"data.audio.seconds_max: must be above 0, not {self.seconds_max}")
        validate_length("data.audio", self.sequence_length, self.positions, "frames", "seconds_max")


def decode_audio(content: bytes, config: AudioConfig) -> np.ndarray:
    """The first `seconds_max` seconds as float32 [n] at 16 kHz, mono, within -1..1; n > 0.

    The content's own header says its sampling rate. Raises ContentError for what is not audio, is
    damaged or ends early within these seconds.
    """
    with (
        content_errors(soundfile.LibsndfileError, ValueError, RuntimeError, MemoryError),
        soundfile.SoundFile(io.BytesIO(content)) as file,
    ):
        _check_header(file)
        wanted = min(file.frames, math.ceil(config.seconds_max * file.samplerate))
        samples = file.read(wanted, dtype="float32", always_2d=True)
        mono = samples[:, 0] if file.channels == 1 else samples.mean(axis=1)  # each takes its time
        if _ends_early(file, content, len(mono) < wanted) or not len(mono):
            raise ContentError("ends early")
        if not np.isfinite(mono).all():
            raise ContentError("a sample is not a finite number")
        if file.samplerate != SAMPLING_RATE:
            mono = soxr.resample(mono, file.samplerate, SAMPLING_RATE)
    return np.clip(mono[: config.samples], -1, 1)


def decode_audio_codes(content: bytes, config: AudioConfig) -> np.ndarray:
    """uint8 [F, 16], at least one frame and at most `positions`; ContentError as `decode_audio`."""
    return encode(decode_audio(content, config))


def audio_seconds(content: bytes) -> float:
    """The length that the header claims, of content that `decode_audio` takes."""
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        return file.frames / file.samplerate


def _check_header(file: soundfile.SoundFile) -> None:
    if file.format not in FORMATS:
        raise ContentError(f"{file.format} is not one of {', '.join(FORMATS)}")
    if file.frames < 1:
        raise ContentError("no samples in it")
    if file.channels > MAX_CHANNELS or file.samplerate not in SAMPLING_RATES:
        raise ContentError(f"claims {file.channels} channels at {file.samplerate} Hz")


def _ends_early(file: soundfile.SoundFile, content: bytes, is_short: bool) -> bool:
    """Whether fewer samples came than the header claims: `is_short`, but for two formats."""
    if file.format == "MP3":
        return False  # the claim is an estimate
    if file.format in ("WAV", "WAVEX") and file.tell() == file.frames:
        claimed = int.from_bytes(content[4:8], "little")  # libsndfile cuts the claim to the content
        return len(content) < claimed < STREAMED
    return is_short
