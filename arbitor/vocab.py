"""The 288 symbols of text: 256 bytes and 32 specials. No tokenizer, on purpose."""

NUM_BYTES = 256
NUM_SPECIALS = 32
VOCAB_SIZE = NUM_BYTES + NUM_SPECIALS

END_OF_DOCUMENT = 256
PADDING = 257  # fills the last sequences of a window; never a target
BEGIN_IMAGE, END_IMAGE = 258, 259
BEGIN_VIDEO, END_VIDEO = 260, 261
BEGIN_AUDIO, END_AUDIO = 262, 263
PATCH = 264  # the place of one patch of an image or a video frame
AUDIO_FRAME = 265  # the place of one frame of audio codes

CONTENT_SYMBOLS = {  # of each modality with content: begin, place, end
    "image": (BEGIN_IMAGE, PATCH, END_IMAGE),
    "audio": (BEGIN_AUDIO, AUDIO_FRAME, END_AUDIO),
    "video": (BEGIN_VIDEO, PATCH, END_VIDEO),
}
