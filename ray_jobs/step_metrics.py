"""Metrics of a step beside its losses: mix, speed, the run and the machine.

`throughput/` and `system/` tell of this execution of the step, `mix/` follows from the plan.
"""

import psutil
import torch

from arbitor.flops import PEAK_FLOPS, slot_flops
from arbitor.main import ARBModel
from arbitor.trainer import StepReport
from data_pipeline.mixture import MILLION
from data_pipeline.run_data import RunData
from ray_jobs.config import RunConfig

_MEGABYTE = 1e6


class StepMetrics:
    """Called once for each step, in order, by worker 0; `start` is the first of them."""

    def __init__(self, config: RunConfig, data: RunData, model: ARBModel, start: int, world: int):
        self._config, self._data, self._world = config, data, world
        self._sources = [source.name for source in data.plan.sources]
        self._served = dict(
            zip(self._sources, data.plan.served(start).sum(axis=1).tolist(), strict=True)
        )
        modalities = {source.modality for source in config.data.active_sources.values()}
        self._flops = {modality: self._slot_flops(model, modality) for modality in modalities}
        self._peak = world * PEAK_FLOPS.get(_device_name(config), 0.0)
        psutil.cpu_percent()  # from here on it tells of the time since the last call

    def __call__(self, report: StepReport) -> dict[str, float]:
        metrics = self._mix(report) | self._throughput(report)
        done = report.step + 1
        if done == 1 or done % self._config.log_interval == 0:
            metrics |= machine_metrics(self._config)
        return metrics

    def _mix(self, report: StepReport) -> dict[str, float]:
        """Shares of all slots up to here: as the weights ask for, and as they were served."""
        slots = self._data.plan.step(report.step)
        for slot in slots:
            self._served[slot.source] += 1
        total = (report.step + 1) * len(slots)
        mixture = self._data.plan.mixture
        target = {
            f"mix/target/{source}": mixture.due(i, total - 1) / MILLION / total
            for i, source in enumerate(self._sources)
        }
        return target | {
            f"mix/realised/{source}": count / total for source, count in self._served.items()
        }

    def _throughput(self, report: StepReport) -> dict[str, float]:
        data = self._config.data
        positions = data.slots_per_step * data.batch_size * data.sequence_length
        metrics = {
            "throughput/step_s": report.seconds,
            "throughput/positions_per_s": positions / report.seconds,
            "throughput/data_wait_pct": 100 * report.data_wait_seconds / report.seconds,
            "throughput/workers": self._world,
        }
        if self._peak:
            flops = sum(
                self._flops[data.sources[slot.source].modality]
                for slot in self._data.plan.step(report.step)
            )
            metrics["throughput/mfu"] = flops / report.seconds / self._peak
        return metrics

    def _slot_flops(self, model: ARBModel, modality: str) -> float:
        data = self._config.data
        media = data.media(modality)
        return slot_flops(
            model,
            modality,
            data.batch_size_of(modality),
            data.sequence_length_of(modality),
            media.positions if media else 0,
        )


def machine_metrics(config: RunConfig) -> dict[str, float]:
    """Of the host of worker 0, under MLflow's names for them."""
    memory = psutil.virtual_memory()
    metrics = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": psutil.disk_usage(config.storage).percent,
    }
    if config.scaling.use_gpu:
        free, total = torch.cuda.mem_get_info()
        metrics["system/gpu_0_memory_usage_megabytes"] = (total - free) / _MEGABYTE
        metrics["system/gpu_0_memory_usage_percentage"] = 100 * (total - free) / total
    return metrics


def _device_name(config: RunConfig) -> str:
    return torch.cuda.get_device_name() if config.scaling.use_gpu else ""
