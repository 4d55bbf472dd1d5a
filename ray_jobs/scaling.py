"""How many workers Ray Train starts, and when it looks whether there is room for others."""

from collections.abc import Mapping

from ray.train import ScalingConfig

from arbitor.errors import UserError
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


def check_gpus(scaling: Scaling, resources: Mapping[str, float], *, can_grow: bool) -> None:
    """Says so where GPUs stay idle; raises UserError where workers would wait for some for ever."""
    gpus = int(resources.get("GPU", 0))
    if gpus and not scaling.use_gpu:
        print(f"trains on the CPU and leaves {gpus} GPU idle; scaling.use_gpu=true takes it")
    if scaling.use_gpu and gpus < scaling.min_workers and not can_grow:
        raise UserError(
            f"scaling.use_gpu: {scaling.min_workers} workers need a GPU each, this machine has"
            f" {gpus}; lower scaling.num_workers, or train on the CPU with scaling.use_gpu=false"
        )
