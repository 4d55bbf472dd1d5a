"""Pretrain on text alone: `python -m ray_jobs.text [CONFIG] [key=value ...] [flags]`."""

from ray_jobs.run import main

DEFAULTS = {"data": {"sources": {"text": {"modality": "text", "path": "sample://text"}}}}

if __name__ == "__main__":
    main("text", __doc__, DEFAULTS)
