"""How many workers Ray Train starts, and when it looks whether there is room for others."""

from ray.train import ScalingConfig

from ray_jobs.config import Scaling

RESIZE_INTERVAL_S = 60.0  # between looks for room for more workers; using it costs a restart


def ray_scaling(scaling: Scaling) -> ScalingConfig:
    """As many workers as asked for; of a range as many as there is room for, then and again later.

    Where that number changes, all workers begin anew with the newest checkpoint.
    """
    workers = scaling.num_workers
    return ScalingConfig(
        num_workers=workers if isinstance(workers, int) else (workers[0], workers[1]),
        use_gpu=scaling.use_gpu,
        # pyrefly: ignore[unexpected-keyword]  the class that Ray takes at import is another
        elastic_resize_monitor_interval_s=RESIZE_INTERVAL_S,
    )
