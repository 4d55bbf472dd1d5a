"""Pixels to the patches that stand in a sequence, and back.

Shape letters: P patches of a picture or of all frames, X bytes of a patch, F frames, H height, W
width.
"""

import numpy as np


def to_patches(pixels: np.ndarray, patch: int) -> np.ndarray:
    """uint8 [..., size, size, 3] -> [..., P, patch * patch * 3], row by row from the top left."""
    *lead, size, _, channels = pixels.shape
    side = size // patch
    tiles = pixels.reshape(*lead, side, patch, side, patch, channels).swapaxes(-4, -3)
    return tiles.reshape(*lead, side * side, patch * patch * channels)


def from_patches(patches: np.ndarray, patch: int) -> np.ndarray:
    """The inverse of `to_patches`: uint8 [..., P, patch * patch * 3] -> [..., size, size, 3]."""
    *lead, count, _ = patches.shape
    side = round(count**0.5)
    tiles = patches.reshape(*lead, side, side, patch, patch, 3).swapaxes(-4, -3)
    return tiles.reshape(*lead, side * patch, side * patch, 3)


def frames_of(patches_PX: np.ndarray, num_frames: int, patch: int) -> np.ndarray:
    """uint8 [F, H, W, 3] of a film's patches."""
    by_frame = patches_PX.reshape(num_frames, -1, patches_PX.shape[-1])
    return from_patches(by_frame, patch)
