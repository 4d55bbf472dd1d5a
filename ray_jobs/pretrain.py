"""Pretrain on weighted sources: `python -m ray_jobs.pretrain [CONFIG] [key=value ...] [flags]`."""

from ray_jobs.run import main

DEFAULTS = {
    "data": {
        "sources": {
            "text": {"modality": "text", "path": "sample://text", "weight": 0.4},
            "code": {"modality": "code", "path": "sample://code", "weight": 0.2},
            "image": {"modality": "image", "path": "sample://image", "weight": 0.2},
            "audio": {"modality": "audio", "path": "sample://audio", "weight": 0.1},
            "video": {"modality": "video", "path": "sample://video", "weight": 0.1},
        }
    }
}

if __name__ == "__main__":
    main("pretrain", __doc__, DEFAULTS)
