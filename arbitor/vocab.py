"""The 288 symbols of text: 256 bytes and 32 specials. No tokenizer, on purpose."""

NUM_BYTES = 256
NUM_SPECIALS = 32
VOCAB_SIZE = NUM_BYTES + NUM_SPECIALS

END_OF_DOCUMENT = 256
PADDING = 257  # fills the last sequences of a window; never a target
