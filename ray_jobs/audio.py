"""Pretrain on sound alone, through the talker head: `python -m ray_jobs.audio [CONFIG] [...]`.

Without attention, as the classic job; model.enable_attention=true lets transcripts be heard.
"""

from ray_jobs.run import main

DEFAULTS = {
    "data": {"sources": {"audio": {"modality": "audio", "path": "sample://audio"}}},
}

if __name__ == "__main__":
    main("audio", __doc__, DEFAULTS)
