"""The five modalities and what the data of each is."""

MODALITIES = ("text", "code", "image", "audio", "video")
BYTE_MODALITIES = ("text", "code")  # rows of bytes, packed; read by the text encoder
