"""Pretrain on pictures in, caption bytes out: `python -m ray_jobs.vision [CONFIG] [...]`.

No video head: patches carry no loss. Without attention, as the classic job, a caption does not see
its picture; model.enable_attention=true lets it.
"""

from ray_jobs.run import main

DEFAULTS = {
    "model": {"enable_video_head": False},
    "data": {"sources": {"image": {"modality": "image", "path": "sample://image"}}},
}

if __name__ == "__main__":
    main("vision", __doc__, DEFAULTS)
