"""Pretrain on pictures and video: `python -m ray_jobs.diffusion [CONFIG] [key=value ...] [flags]`.

Without attention in the trunk, as the classic job; the video head reads the caption all the same.
"""

from ray_jobs.run import main

DEFAULTS = {
    "data": {
        "sources": {
            "image": {"modality": "image", "path": "sample://image", "weight": 0.5},
            "video": {"modality": "video", "path": "sample://video", "weight": 0.5},
        }
    },
}

if __name__ == "__main__":
    main("diffusion", __doc__, DEFAULTS)
