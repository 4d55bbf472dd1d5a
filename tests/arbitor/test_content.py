"""Content: the decoder against the whole sequence, denoising to a known answer, and a model that
has learned two rows by heart gives them back as files."""

import io
from dataclasses import replace

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from arbitor import content, vocab
from arbitor.audio_codec import HOP, SAMPLING_RATE, encode
from arbitor.batch import SlotBatch
from arbitor.content import continue_freely, describe, generate_content, speakable
from arbitor.decoder import Decoder, Sampling
from arbitor.encoder.places import Places
from arbitor.errors import UserError
from arbitor.export import open_model
from arbitor.generate import main
from arbitor.head.router import BYTE_HEAD, TALKER_HEAD, VIDEO_HEAD
from arbitor.head.video import Context
from arbitor.main import ARBModel
from arbitor.media.files import FRAME_SIDE, mp4
from arbitor.media.patches import to_patches
from arbitor.optimizer import TernaryOptimizer, UpdateConfig
from arbitor.trainer import SlotRunner, train_step
from data_pipeline.decode.audio import AudioConfig
from data_pipeline.decode.image import ImageConfig
from data_pipeline.decode.video import VideoConfig
from data_pipeline.layout import layout_of
from tests.arbitor.content_slots import ALL_PARTS, SHAPES, made_up_slot
from tests.arbitor.test_export import save

GREEDY = Sampling(temperature=0)
CAPTIONS = {"image": ("dark", "pale"), "audio": ("hiss", "rest"), "video": ("dusk", "dawn")}
STEPS = 130
LEARNER = replace(ALL_PARTS, num_layers=1)
LAYOUTS = {  # of content_slots.IMAGE, VIDEO and SHAPES
    "image": layout_of(ImageConfig(size=8, patch=4, sequence_length=20)),
    "audio": layout_of(AudioConfig(seconds_max=0.18, sequence_length=20)),
    "video": layout_of(VideoConfig(size=8, patch=4, num_frames=3, sequence_length=20)),
}


@pytest.fixture(scope="module")
def fresh():
    return ARBModel(ALL_PARTS, seed=1)


@pytest.mark.parametrize("modality", vocab.CONTENT_SYMBOLS)
def test_a_decoder_takes_content_in_any_portions(fresh, modality):
    """Half of the rows of a slot's caption, its content and more bytes, against all at once."""
    batch = made_up_slot(modality)
    with torch.no_grad():
        whole = fresh.hidden(fresh.embed(batch, Places.of(batch)))
    places, begin = SHAPES[modality][0], 7
    decoder, symbols = Decoder(fresh, 3), batch.symbols_BT
    decoder.feed(symbols[:, :begin])
    for first in range(0, places, 3):
        decoder.feed_content(modality, batch.content_BPX[:, first : first + 3], first)
    logits = decoder.feed(symbols[:, begin + places :][:, :1])
    end = begin + places + 1
    assert decoder.length == end
    expected, found = whole[:, :end].float(), decoder.states_BTD.float()
    # As for text in test_generate: the quantizer may round another way here and there.
    assert (expected - found).norm() < 1e-2 * expected.norm()
    expected = fresh.byte_head(whole[:, end - 1]).float()
    assert (expected - logits).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("num_steps", [1, 4, 64])
def test_sampling_follows_the_field_from_noise_to_its_end(fresh, num_steps, monkeypatch):
    """Towards a known frame the field is straight: Euler steps of any number end there."""
    head, P, X = fresh.video_head, 4, 48
    answer = torch.linspace(-1, 1, 2 * P * X).view(2, 1, P, X)
    seen = []

    def velocity(modality, noisy_BFPX, time_BF, frame_F, hidden_BTD, first_B):
        seen.append((modality, time_BF.unique().item(), frame_F.tolist(), noisy_BFPX))
        return (answer - noisy_BFPX) / (1 - time_BF[..., None, None] / 64)

    monkeypatch.setattr(head, "forward", velocity)
    hidden, first = torch.zeros(2, 9, 64), torch.tensor([1, 1])
    key = torch.tensor([5], dtype=torch.int32)
    values = head.sample("video", 2, Context(hidden, first), key, num_steps)
    assert [(m, s, f) for m, s, f, _ in seen] == [
        ("video", i * 64 // num_steps, [2]) for i in range(num_steps)
    ]
    noise = seen[0][3]
    # Six standard deviations of mean and variance of so many numbers.
    assert abs(noise.mean()) < 6 * noise.numel() ** -0.5
    assert abs(noise.var() - 1) < 6 * (2 / noise.numel()) ** 0.5
    # Each of the steps rounds to float32, and the last divides by 1 / num_steps.
    assert (values - answer.squeeze(1)).abs().max() < 1e-6 * num_steps
    other = head.sample("video", 2, Context(hidden, first), ~key, 1)
    assert torch.equal(seen[-1][3], noise) is False and other.shape == (2, P, X)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_goes_beyond_what_the_caption_adds(fresh, guidance, monkeypatch):
    """Fields straight to a frame with the caption and to another without it."""
    head, answer = fresh.video_head, {7: 0.5, 1: 0.25}

    def velocity(modality, noisy_BFPX, time_BF, frame_F, hidden_BTD, first_B):
        share = time_BF[..., None, None] / 64
        return (answer[first_B.unique().item()] - noisy_BFPX) / (1 - share)

    monkeypatch.setattr(head, "forward", velocity)
    captioned = Context(torch.zeros(2, 9, 64), torch.tensor([7, 7]))
    uncaptioned = Context(torch.zeros(2, 3, 64), torch.tensor([1, 1]))
    key = torch.tensor([5], dtype=torch.int32)
    values = head.sample("image", 0, captioned, key, 4, uncaptioned, guidance)
    assert (values - (0.25 + guidance * 0.25)).abs().max() < 1e-5


def rows(modality):
    """Two contents, uint8 [P, X], far from one another."""
    places, width = SHAPES[modality]
    if modality == "audio":
        time = np.arange(places * HOP) / SAMPLING_RATE
        loud = np.random.default_rng(0).normal(size=len(time)).astype(np.float32) / 4
        return [encode(loud), encode(np.float32(0.3) * np.sin(2 * np.pi * 300 * time))]
    ramp = np.linspace(0, 60, places * width).astype(np.uint8).reshape(places, width)
    return [ramp, 255 - ramp]


def slot(modality, step, number):
    """Both rows, each in both orders, as the data pipeline lays them out."""
    layout, found, contents = LAYOUTS[modality], {}, []
    for i, caption in enumerate(CAPTIONS[modality]):
        row_id = 0
        while sum(key[0] == i for key in found) < 2:
            symbols, _ = layout.symbols(layout.places, caption.encode(), 0, row_id)
            found[i, symbols[0] == layout.begin] = symbols
            row_id += 1
    sequences = np.full((len(found), layout.sequence_length + 1), vocab.PADDING, np.uint16)
    for sequence, (key, symbols) in zip(sequences, found.items(), strict=True):
        sequence[: len(symbols) + 1] = [vocab.END_OF_DOCUMENT, *symbols]
        contents.append(rows(modality)[key[0]])
    return SlotBatch.from_symbols(
        sequences,
        step=step,
        slot=number,
        source=modality,
        modality=modality,
        content=np.stack(contents),
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run whose model has learned both rows of each modality."""
    update = UpdateConfig(warmup_steps=10, table_rate=1.0)
    model = ARBModel(LEARNER, 0)
    optimizer = TernaryOptimizer(model, update, total_steps=STEPS, slots_per_step=3, seed=0)
    run_slot = SlotRunner(model, optimizer)
    for step in range(STEPS):
        train_step(run_slot, step, [slot(m, step, i) for i, m in enumerate(CAPTIONS)])
    folder = tmp_path_factory.mktemp("run")
    save(folder, config=LEARNER, model=model)
    return folder


@pytest.fixture(scope="module")
def model(run_folder):
    return open_model(run_folder).model


@pytest.mark.parametrize("modality", CAPTIONS)
def test_what_was_learned_is_spoken_and_described(model, modality):
    captions = [caption.encode() for caption in CAPTIONS[modality]]
    spoken = generate_content(model, modality, captions, GREEDY)
    for i, (content_PX, row_PX) in enumerate(zip(spoken, rows(modality), strict=True)):
        assert content_PX.shape == row_PX.shape and content_PX.dtype == np.uint8
        errors = [abs(content_PX.astype(int) - other).mean() for other in rows(modality)]
        assert errors[i] < errors[1 - i] / 4
    described = describe(model, modality, np.stack(rows(modality)), 20, GREEDY)
    assert described == list(CAPTIONS[modality])


@pytest.mark.parametrize("modality", ["image", "video"])
def test_guidance_takes_the_same_decoder_without_the_caption(model, modality):
    captions = [caption.encode() for caption in CAPTIONS[modality]]
    ignored = [
        generate_content(model, modality, [caption], replace(GREEDY, guidance=0.0))[0]
        for caption in captions
    ]
    assert (ignored[0] == ignored[1]).all()
    guided = generate_content(model, modality, captions, replace(GREEDY, guidance=1.5))
    for i, content_PX in enumerate(guided):
        errors = [abs(content_PX.astype(int) - other).mean() for other in rows(modality)]
        assert errors[i] < errors[1 - i] / 4


def generate(run_folder, *words):
    main(["--checkpoint", str(run_folder), "--temperature", "0", *map(str, words)])


def test_a_picture_is_a_png_of_what_the_model_sees_and_its_caption_is_printed(
    run_folder, tmp_path, capsys
):
    out = tmp_path / "out"
    for caption in CAPTIONS["image"]:
        words = ("--modality", "image", "--caption", caption, "--samples", 2)
        generate(run_folder, *words, "--out", out / caption)
        written = capsys.readouterr().out.split()
        assert written == [str(out / caption / name) for name in ("00.png", "01.png")]
    dark, pale = (np.asarray(Image.open(out / c / "00.png")) for c in CAPTIONS["image"])
    assert dark.shape == (8, 8, 3) and dark.mean() + 100 < pale.mean()
    patches = generate_content(open_model(run_folder).model, "image", [b"dark"] * 2, GREEDY)
    assert (to_patches(dark, 4) == patches[0]).all() and (patches[0] != patches[1]).any()
    for caption in CAPTIONS["image"]:
        generate(run_folder, "--image", out / caption / "00.png", "--length", 20)
        assert capsys.readouterr().out == f"{caption}\n"


def test_sound_is_a_wav_that_ends_where_the_router_says(run_folder, tmp_path):
    places = SHAPES["audio"][0]
    generate(run_folder, "--modality", "audio", "--caption", "rest", "--out", tmp_path)
    sound, rate = soundfile.read(tmp_path / "00.wav", dtype="float32")
    assert rate == SAMPLING_RATE and len(sound) == places * HOP
    spectrum = abs(np.fft.rfft(sound))
    assert abs(spectrum.argmax() * rate / len(sound) - 300) < 50, "a tone, as the row is"
    generate(run_folder, "--modality", "audio", "--seconds", 0.1, "--out", tmp_path)
    assert soundfile.info(tmp_path / "00.wav").frames == 5 * HOP


def test_a_film_is_an_mp4_of_its_frames(run_folder, tmp_path):
    for caption in CAPTIONS["video"]:
        words = ("--modality", "video", "--caption", caption, "--out", tmp_path / caption)
        generate(run_folder, *words)
    found = []
    for caption in CAPTIONS["video"]:
        with av.open(str(tmp_path / caption / "00.mp4")) as container:
            assert float(container.streams.video[0].average_rate) == 4.0
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert len(frames) == ALL_PARTS.video.frames and frames[0].shape == (96, 96, 3)
        found.append(np.mean(frames))
    assert found[0] + 100 < found[1]


def test_a_film_of_odd_sides_loses_a_row_and_a_column_and_is_not_rescaled():
    side = FRAME_SIDE + 1
    noise = np.random.default_rng(0).integers(0, 256, (2, side, side, 1), dtype=np.uint8)
    film = noise.repeat(3, axis=-1)
    with av.open(io.BytesIO(mp4(film, 4.0))) as container:
        found = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert found.shape == (2, FRAME_SIDE, FRAME_SIDE, 3)
    error = np.abs(found.astype(int) - film[:, :FRAME_SIDE, :FRAME_SIDE]).mean()
    assert error < 4  # quantized, while neighbours differ by 85 on average


def test_freely_the_byte_head_begins_and_the_router_says_who_speaks(model, monkeypatch):
    kinds = set()
    for seed in range(12):
        pieces = list(continue_freely(model, b"", 30, Sampling(seed=seed, steps=1)))
        kinds |= {piece.modality for piece in pieces}
        for piece in pieces:
            if piece.modality != "text":
                assert piece.content.shape[1] == SHAPES[piece.modality][1]
    assert kinds == {"text", *vocab.CONTENT_SYMBOLS}, "every row begins one of them, in both orders"

    def refuse(decoder, head, sampling, generator):
        assert head in (TALKER_HEAD, VIDEO_HEAD)
        return torch.tensor([BYTE_HEAD])

    monkeypatch.setattr(content, "_next_head", refuse)
    pieces = [p for s in range(3) for p in continue_freely(model, b"d", 9, Sampling(seed=s))]
    assert {piece.modality for piece in pieces} == {"text"}


def test_the_command_writes_what_comes_freely(run_folder, tmp_path, capsys):
    words = ["--checkpoint", str(run_folder), "--prompt", "dark", "--samples", "2"]
    main([*words, "--length", "3", "--out", str(tmp_path / "out"), "--temperature", "0"])
    written = capsys.readouterr().out.split()
    assert [path.rpartition("/")[2] for path in written] == ["00-0.png", "01-0.png"]
    assert Image.open(io.BytesIO((tmp_path / "out" / "00-0.png").read_bytes())).size == (8, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modality", "image"], "--modality image: give --out"),
        (["--image", "no/such.png"], "--image no/such.png: cannot be read as a picture"),
        (["--caption", "x"], "--caption: give --modality too"),
        (
            ["--modality", "audio", "--out", "x", "--steps", "5"],
            "--steps: expected a divisor of 64",
        ),
        (["--seconds", "0"], "--seconds: expected 0.02"),
        (["--image", "x.png", "--modality", "image"], "--image: its caption is printed"),
    ],
)
def test_a_mistake_names_the_flag(run_folder, words, message):
    with pytest.raises(UserError, match=message):
        main(["--checkpoint", str(run_folder), *words])


def test_what_was_not_built_is_named(tmp_path):
    save(tmp_path)
    words = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="image: this model was built without .* for text alone"):
        main([*words, "--modality", "image"])
    with pytest.raises(UserError, match="has no output router"):
        main(words)
    assert speakable(open_model(tmp_path).model) == []
