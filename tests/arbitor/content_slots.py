"""Made-up slots of every modality, as `data_pipeline.pack` makes them of rows."""

import numpy as np

from arbitor import vocab
from arbitor.audio_codec import NUM_CODES
from arbitor.batch import SlotBatch
from arbitor.encoder.image import PatchGrid
from arbitor.main import ModelConfig

IMAGE = PatchGrid(patch=4, side=2)
VIDEO = PatchGrid(patch=4, side=2, frames=3)
ALL_PARTS = ModelConfig(
    width=64,
    num_layers=2,
    head_width=32,
    rotary_width=16,
    video_head_layers=1,
    enable_attention=True,
    enable_output_router=True,
    enable_image=True,
    enable_audio=True,
    enable_video=True,
    enable_talker_head=True,
    enable_video_head=True,
    image=IMAGE,
    video=VIDEO,
)
SHAPES = {"image": (4, 48), "video": (12, 48), "audio": (9, NUM_CODES)}  # places, their bytes
CAPTION = 5


def made_up_slot(modality: str, rows: int = 3, caption_first: bool = True, seed: int = 0):
    """A slot of `rows` sequences of 5 caption bytes and all places; text: random bytes alone."""
    random = np.random.default_rng(seed)
    if modality not in vocab.CONTENT_SYMBOLS:
        symbols = random.integers(0, vocab.NUM_BYTES, (rows, 25), dtype=np.uint16)
        return SlotBatch.from_symbols(symbols, step=3, slot=1, source="s", modality=modality)
    begin, place, end = vocab.CONTENT_SYMBOLS[modality]
    places, width = SHAPES[modality]
    sequences = np.full((rows, places + CAPTION + 6), vocab.PADDING, np.uint16)
    for row in sequences:
        caption = random.integers(0, vocab.NUM_BYTES, CAPTION).tolist()
        content = [begin, *[place] * places, end]
        symbols = [vocab.END_OF_DOCUMENT]
        symbols += [*caption, *content] if caption_first else [*content, *caption]
        row[: len(symbols)] = symbols
    return SlotBatch.from_symbols(
        sequences,
        step=3,
        slot=1,
        source="s",
        modality=modality,
        content=random.integers(0, 256, (rows, places, width), dtype=np.uint8),
    )
