"""Pictures, sound and film from a trained model, captions of them, and what it goes on with freely.

Sequences are laid out as slots of training: END_OF_DOCUMENT, a caption or none, BEGIN, the places,
END. A picture and a film have the places of their grid; sound ends where the router says so, or
after `Sampling.seconds`.
Shape letters: B samples, D width, P places, X bytes of a place, F frames, C codes of a frame,
T positions, H heads.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from arbitor.audio_codec import FRAMES_PER_SECOND
from arbitor.decoder import Decoder, Sampling, continue_text, texts
from arbitor.encoder.image import to_pixels
from arbitor.errors import UserError
from arbitor.head.router import BYTE_HEAD, NUM_HEADS, TALKER_HEAD, VIDEO_HEAD
from arbitor.head.video import Context
from arbitor.main import ARBModel
from arbitor.vocab import CONTENT_SYMBOLS, END_OF_DOCUMENT, NUM_BYTES


class Piece(NamedTuple):
    """A part of what a model goes on with: text, or the content of one picture, clip or film."""

    modality: str
    content: bytes | np.ndarray  # uint8 [P, X] but for text


def speakable(model: ARBModel) -> list[str]:
    """The modalities that a model has both an encoder and a head for."""
    heads = {"audio": model.talker_head, "image": model.video_head, "video": model.video_head}
    return [
        name
        for name in CONTENT_SYMBOLS
        if heads[name] is not None and model.content_encoder(name) is not None
    ]


def generate_content(
    model: ARBModel, modality: str, captions: Sequence[bytes], sampling: Sampling
) -> list[np.ndarray]:
    """Content for each caption, uint8 [P, X]; the captions have one length, which may be 0."""
    _require(model, modality, speakable(model), "a head that speaks it")
    decoder, begin = Decoder(model, len(captions)), CONTENT_SYMBOLS[modality][0]
    decoder.feed(torch.tensor([[END_OF_DOCUMENT, *caption, begin] for caption in captions]))
    generator = sampling.generator()
    if modality == "audio":
        return _speak_sound(decoder, sampling, generator)
    if sampling.guidance == 1:
        return _show(decoder, modality, sampling, generator)
    uncaptioned = Decoder(model, len(captions))  # as in the rows whose caption comes after
    uncaptioned.feed(torch.tensor([[END_OF_DOCUMENT, begin]]).expand(len(captions), -1))
    return _show(decoder, modality, sampling, generator, uncaptioned)


def describe(
    model: ARBModel, modality: str, content_BPX: np.ndarray, length: int, sampling: Sampling
) -> list[str]:
    """A caption of at most `length` bytes for each content, uint8."""
    readable = [name for name in CONTENT_SYMBOLS if model.content_encoder(name) is not None]
    _require(model, modality, readable, "an encoder that reads it")
    decoder = Decoder(model, len(content_BPX))
    begin, _, end = CONTENT_SYMBOLS[modality]
    decoder.feed(torch.tensor([[END_OF_DOCUMENT, begin]]).expand(len(content_BPX), -1))
    decoder.feed_content(modality, torch.from_numpy(content_BPX), 0)
    ends_B1 = torch.full((len(content_BPX), 1), end)
    return texts(list(continue_text(decoder, ends_B1, length, sampling, sampling.generator())))


def continue_freely(
    model: ARBModel, prompt: bytes, length: int, sampling: Sampling
) -> Iterator[Piece]:
    """One sample of whatever comes after the prompt: at most `length` bytes and contents, as
    learned: there is no caption to be guided towards.

    The byte head begins a content, and the router says whether its head speaks.
    """
    generator, spoken = sampling.generator(), speakable(model)
    begins = {CONTENT_SYMBOLS[name][0]: name for name in spoken}
    drawn = torch.tensor([*range(NUM_BYTES), END_OF_DOCUMENT, *begins])
    decoder, text = Decoder(model, 1), b""
    logits_BV = decoder.feed(torch.tensor([[END_OF_DOCUMENT, *prompt]]))
    for _ in range(length):
        symbol = int(drawn[sampling.draw(logits_BV[:, drawn], generator)])
        if symbol == END_OF_DOCUMENT:
            break
        logits_BV = decoder.feed(torch.tensor([[symbol]]))
        if symbol < NUM_BYTES:
            text += bytes([symbol])
            continue
        modality = begins[symbol]
        head = TALKER_HEAD if modality == "audio" else VIDEO_HEAD
        if _next_head(decoder, head, sampling, generator).item() == head:
            if text:
                yield Piece("text", text)
            text = b""
            if modality == "audio":
                (content,) = _speak_sound(decoder, sampling, generator)
            else:
                (content,) = _show(decoder, modality, sampling, generator)
            yield Piece(modality, content)
            logits_BV = decoder.feed(torch.tensor([[CONTENT_SYMBOLS[modality][2]]]))
    if text:
        yield Piece("text", text)


def _require(model: ARBModel, modality: str, possible: list[str], part: str) -> None:
    if modality not in possible:
        raise UserError(
            f"{modality}: this model was built without {part}; it has that for"
            f" {', '.join(possible) or 'text alone'}"
        )


def _show(
    decoder: Decoder,
    modality: str,
    sampling: Sampling,
    generator: torch.Generator,
    uncaptioned: Decoder | None = None,
) -> list[np.ndarray]:
    """The picture or film after BEGIN, uint8 [P, X] a sample; the decoders have read it."""
    head, decoders = decoder.model.video_head, [d for d in (decoder, uncaptioned) if d]
    grid, frames = head.grids[modality], []
    firsts = [torch.full((d.batch_size,), d.length, device=d.device) for d in decoders]
    for frame in range(grid.frames):
        key = torch.randint(-(2**31), 2**31, (1,), generator=generator).int().to(decoder.device)
        context, *others = (
            Context(d.states_BTD, first_B) for d, first_B in zip(decoders, firsts, strict=True)
        )
        values_BPX = head.sample(
            modality, frame, context, key, sampling.steps, *others, guidance=sampling.guidance
        )
        frames.append(to_pixels(values_BPX))
        for each in decoders:
            each.feed_content(modality, frames[-1], frame * grid.patches_per_frame)
    return list(torch.cat(frames, dim=1).cpu().numpy())


def _speak_sound(
    decoder: Decoder, sampling: Sampling, generator: torch.Generator
) -> list[np.ndarray]:
    """The sound after BEGIN, uint8 [F, C] a sample; the decoder has read it."""
    model, frames = decoder.model, []
    longest = math.ceil(sampling.seconds * FRAMES_PER_SECOND)
    length_B = torch.full((decoder.batch_size,), longest)
    while len(frames) < length_B.max():
        with torch.no_grad():
            logits_BCV = model.talker_head(decoder.last_BD).float().cpu()
        codes_B = sampling.draw(logits_BCV.flatten(0, 1), generator)
        codes_BC = codes_B.view(logits_BCV.shape[:2]).to(torch.uint8)
        decoder.feed_content("audio", codes_BC.unsqueeze(1), len(frames))
        frames.append(codes_BC)
        if model.output_router is not None:
            ends_B = _next_head(decoder, TALKER_HEAD, sampling, generator) != TALKER_HEAD
            length_B = torch.where(ends_B, length_B.clamp(max=len(frames)), length_B)
    return [
        clip_FC[:length].numpy()
        for clip_FC, length in zip(torch.stack(frames, dim=1), length_B.tolist(), strict=True)
    ]


def _next_head(
    decoder: Decoder, head: int, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """int64 [B]: whether `head` speaks next or the byte head, by the router."""
    with torch.no_grad():
        logits_BH = decoder.model.output_router(decoder.last_BD).float().cpu()
    others = [other for other in range(NUM_HEADS) if other not in (BYTE_HEAD, head)]
    logits_BH[:, others] = -torch.inf
    return sampling.draw(logits_BH, generator)
