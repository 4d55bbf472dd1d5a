"""Audio: every format and rate gives the same sound and codes; what is refused."""

import numpy as np
import pytest

from arbitor.audio_codec import encode, spectral_distance
from arbitor.errors import UserError
from data_pipeline.decode.audio import AudioConfig, decode_audio, decode_audio_codes
from tests.data_pipeline.media import damaged, encode_audio, refused

CONFIG = AudioConfig(seconds_max=1.5, sequence_length=128)
FORMATS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)]


def tone(rate: int, seconds: float = 1.0, channels: int = 1) -> np.ndarray:
    time = np.arange(int(rate * seconds)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * np.sin(2 * np.pi * 2000 * time)
    return np.repeat(wave[:, None], channels, axis=1)


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (22_050, 1), (8_000, 2)])
def test_any_format_and_rate_gives_the_same_sound(kind, subtype, rate, channels):
    waveform = decode_audio(encode_audio(tone(rate, 1, channels), rate, kind, subtype), CONFIG)
    assert waveform.dtype == np.float32
    assert abs(len(waveform) - 16_000) <= 2 + 3_000 * (kind == "MP3")  # MP3 pads its frames
    middle, expected = waveform[4000:12_000], tone(16_000)[4000:12_000, 0].astype(np.float32)
    if kind in ("WAV", "FLAC"):
        # 16-bit rounding is 3e-5; the resampler's passband ripple is below that.
        assert abs(middle - expected).max() < 2e-4
    else:
        # Lossy, and shifted by the codec's delay: the energy stands in the same bands.
        spectra = [abs(np.fft.rfft(wave * np.hanning(8000))) for wave in (middle, expected)]
        for hertz in (440, 2000):
            peak = [spectrum[hertz // 2 - 4 : hertz // 2 + 5].max() for spectrum in spectra]
            assert peak[0] == pytest.approx(peak[1], rel=0.1)


def test_no_more_than_the_configured_seconds_are_read():
    for rate in (16_000, 44_100):
        content = encode_audio(tone(rate, 3), rate, "FLAC")
        assert len(decode_audio(content, CONFIG)) == 24_000
        codes = decode_audio_codes(content, CONFIG)
        assert codes.shape == (CONFIG.positions, 16) == (75, 16)
        # What lies behind is never looked at.
        head = content[: int(len(content) * 0.75)]
        np.testing.assert_array_equal(decode_audio_codes(head, CONFIG), codes)
    short = decode_audio_codes(encode_audio(tone(16_000, 0.05), 16_000, "WAV"), CONFIG)
    assert short.shape == (3, 16)
    expected = encode(tone(16_000, 0.05)[:, 0].astype(np.float32))
    assert abs(short.astype(int) - expected).max() <= 1  # 16-bit rounding


def test_loud_float_samples_are_cut_and_infinite_ones_refused():
    loud = decode_audio(encode_audio(9 * tone(16_000), 16_000, "WAV", "FLOAT"), CONFIG)
    assert abs(loud).max() == 1
    wave = tone(16_000)
    wave[5000] = np.nan
    refused(decode_audio, encode_audio(wave, 16_000, "WAV", "FLOAT"), CONFIG, "finite")


@pytest.mark.parametrize("channels", [1, 2])
def test_samples_at_the_rate_wanted_are_those_of_the_file(channels):
    content = encode_audio(tone(16_000, 1, channels), 16_000, "WAV", "FLOAT")
    expected = tone(16_000)[:, 0].astype(np.float32)
    assert decode_audio(content, CONFIG).tobytes() == expected.tobytes()


@pytest.mark.parametrize(("kind", "subtype"), [*FORMATS, ("OGG", "OPUS")])
def test_truncated_and_flipped_content_is_refused_or_decoded(kind, subtype):
    content = encode_audio(tone(16_000), 16_000, kind, subtype)
    refused(decode_audio, b"", CONFIG)
    refused(decode_audio, content[:30], CONFIG)
    if kind != "MP3":  # it has no length: what is there is all of it
        refused(decode_audio, content[: len(content) // 2], CONFIG)
    damaged(decode_audio, content, CONFIG)


def test_a_lost_page_leaves_too_few_samples():
    content = encode_audio(tone(48_000, 1, 2), 48_000, "OGG", "OPUS")
    pages = [i for i in range(len(content)) if content.startswith(b"OggS", i)]
    refused(decode_audio, content[: pages[3]] + content[pages[4] :], CONFIG, "ends early")


def test_ten_hours_in_the_header_cost_nothing():
    flac = bytearray(encode_audio(tone(16_000), 16_000, "FLAC"))
    samples = 10 * 3600 * 16_000
    flac[21] = flac[21] & 0xF0 | samples >> 32  # total samples: 36 bits of STREAMINFO
    flac[22:26] = (samples & 0xFFFF_FFFF).to_bytes(4, "big")
    refused(decode_audio, bytes(flac), CONFIG)
    whole = decode_audio(bytes(flac), AudioConfig(seconds_max=0.9))
    assert spectral_distance(whole, tone(16_000)[:, 0].astype(np.float32)) < 1
    wav = bytearray(encode_audio(tone(16_000), 16_000, "WAV"))
    for start in (4, 40):
        wav[start : start + 4] = (samples * 2).to_bytes(4, "little")
    refused(decode_audio, bytes(wav), CONFIG, "early")


def test_other_content_is_refused():
    refused(decode_audio, encode_audio(tone(16_000)[:0], 16_000, "WAV"), CONFIG, "no samples")
    refused(decode_audio, encode_audio(tone(16_000), 16_000, "AIFF"), CONFIG, "AIFF is not one of")
    refused(decode_audio, encode_audio(tone(16_000, 0.1, 17), 16_000, "WAV"), CONFIG, "17 channels")
    refused(decode_audio, encode_audio(tone(16_000), 1_000, "WAV"), CONFIG, "1000 Hz")
    refused(decode_audio, bytes(5000), CONFIG)


@pytest.mark.parametrize("key", ["seconds_max", "sequence_length"])
def test_a_configuration_that_does_not_fit_names_its_key(key):
    AudioConfig().validate()
    with pytest.raises(UserError, match=f"data.audio.{key}"):
        AudioConfig(**{key: 0}).validate()


@pytest.mark.parametrize("seconds", [0.14, 1.1, 4.0, 8.06, 8.14, 16.12])
def test_a_clip_cut_at_any_second_has_the_frames_of_the_layout(seconds):
    config = AudioConfig(seconds_max=seconds, sequence_length=1024)
    content = encode_audio(np.zeros(17 * 16_000), 16_000, "WAV")
    assert len(decode_audio_codes(content, config)) == config.positions
