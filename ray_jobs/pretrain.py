"""Pretrain on weighted sources: `python -m ray_jobs.pretrain [CONFIG] [key=value ...] [flags]`."""

from ray_jobs.run import main

DEFAULTS = {
    "data": {
        "sources": {
            "text": {"modality": "text", "path": "sample://text", "weight": 0.6},
            "code": {"modality": "code", "path": "sample://code", "weight": 0.4},
        }
    }
}

if __name__ == "__main__":
    main("pretrain", __doc__, DEFAULTS)
