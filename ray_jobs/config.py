"""RunConfig, all that a run is made of: defaults < YAML < `key.path=value` < classic flags."""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from arbitor.errors import UserError
from arbitor.kernel.backend import BACKENDS
from arbitor.kernel.latent_update.fixed_point import SEEDS
from arbitor.kernel.latent_update.slots import MAX_SLOTS
from arbitor.loss import LossWeight
from arbitor.main import ModelConfig
from arbitor.modality import MODALITIES
from arbitor.optimizer import UpdateConfig
from arbitor.settings import build, parse_value, read_yaml, set_value
from data_pipeline.command import set_values
from data_pipeline.schema import DataConfig


@dataclass(frozen=True)
class Scaling:
    """How many workers share the slots of a step, and what each of them runs on."""

    # Two numbers: as many workers as there is room for, from the first to the second. The bits are
    # the same for any number.
    num_workers: int | list[int] = 1
    use_gpu: bool = False
    # The number of threads changes the bits of a float sum: it belongs to the run, not to the host.
    threads_per_worker: int = 2

    def validate(self) -> None:
        given = self.num_workers
        is_range = isinstance(given, int) or (len(given) == 2 and given[0] <= given[1])
        if not is_range or self.min_workers < 1:
            raise UserError(
                "scaling.num_workers: expected a number of at least 1, or [smallest, largest], got"
                f" {given}"
            )
        if self.threads_per_worker < 1:
            raise UserError(
                f"scaling.threads_per_worker: expected at least 1, got {self.threads_per_worker}"
            )

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[-1]


@dataclass(frozen=True)
class Tracking:
    """Where MLflow keeps the losses; no URI means SQLite beside the run folders."""

    uri: str = ""
    experiment: str = "arbitor"


@dataclass(frozen=True)
class Resume:
    """What an unfinished run may go on with although its bits will not be those of one run."""

    allow_changed_data: bool = False  # shards added, removed or changed since its checkpoint


@dataclass(frozen=True)
class Recovery:
    """What a run bears before it gives up."""

    # Failures in a row without a step that was not done before; failures with progress between
    # them never end a run.
    max_failures: int = 3
    step_timeout_s: float = 600.0  # a worker without a step for so long hangs, and is killed

    def validate(self) -> None:
        if self.max_failures < 0:
            raise UserError(f"recovery.max_failures: expected 0 or more, got {self.max_failures}")
        if self.step_timeout_s <= 0:
            raise UserError(
                f"recovery.step_timeout_s: expected more than 0, got {self.step_timeout_s}"
            )


@dataclass(frozen=True)
class RunConfig:
    """One training run; it lives in the folder `storage/name`."""

    name: str
    storage: str = "runs"  # made absolute: workers do not run where the command was typed
    mirror: str = ""  # s3://bucket/folder that keeps a copy of the run, to go on from
    init_from: str = ""  # a run or a checkpoint whose weights this run begins with
    seed: int = 0
    steps: int = 1000
    backend: str = "auto"
    log_interval: int = 10
    eval_interval: int = 200  # 0 = never; otherwise also after the last step
    sample_interval: int = 0  # steps between samples of each modality, 0 = never
    save_interval: int = 200  # 0 = only after the last step
    save: bool = True
    keep_checkpoints: int = 2  # the newest ones; one that turns out damaged needs one before it
    profile: bool = False  # write down where the time of one step goes
    log_slots: bool = False  # write down the rows and a hash of every slot that a worker computed
    model: ModelConfig = field(default_factory=ModelConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    loss_weight: LossWeight = field(default_factory=LossWeight)
    data: DataConfig = field(default_factory=DataConfig)
    scaling: Scaling = field(default_factory=Scaling)
    tracking: Tracking = field(default_factory=Tracking)
    resume: Resume = field(default_factory=Resume)
    recovery: Recovery = field(default_factory=Recovery)

    def validate(self) -> None:
        smallest = {"steps": 1, "log_interval": 1, "eval_interval": 0, "save_interval": 0}
        smallest |= {"sample_interval": 0, "keep_checkpoints": 2}
        for name, minimum in smallest.items():
            if getattr(self, name) < minimum:
                raise UserError(f"{name}: expected at least {minimum}, got {getattr(self, name)}")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UserError(f"name: expected a folder name without '/', got {self.name!r}")
        if self.mirror and "://" not in self.mirror:
            raise UserError(f"mirror: expected a URI such as s3://bucket/runs, got {self.mirror!r}")
        if self.backend not in BACKENDS:
            raise UserError(f"backend: expected one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if self.seed not in SEEDS:
            raise UserError(f"seed: expected 0 to 2^32 - 1, got {self.seed}")
        self.update.check_activation(self.model.activation)
        if self.data.slots_per_step > MAX_SLOTS:
            raise UserError(
                f"data.slots_per_step: expected at most {MAX_SLOTS} (their sum must stay exact),"
                f" got {self.data.slots_per_step}; raise data.batch_size instead"
            )
        if self.scaling.max_workers > self.data.slots_per_step:
            raise UserError(
                f"scaling.num_workers: {self.scaling.max_workers} workers cannot share"
                f" {self.data.slots_per_step} slots a step; lower it or raise data.slots_per_step"
            )

    @property
    def folder(self) -> Path:
        return Path(self.storage) / self.name

    def values(self) -> dict[str, Any]:
        """Plain data from which `build(RunConfig, ...)` makes an equal object."""
        return asdict(self)


IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the command of a submitted job

CONFIG = "config.yaml"  # in the run's folder: its resolved configuration

# The classic flags are aliases of configuration keys.
_FLAGS = {
    "--steps": ("steps", "optimizer steps"),
    "--batch": ("data.batch_size", "sequences in a slot"),
    "--ctx": ("data.sequence_length", "positions in a sequence"),
    "--run": ("name", "name of the run and of its folder"),
    "--backend": ("backend", f"one of {', '.join(BACKENDS)}"),
    "--log-interval": ("log_interval", "steps between console lines"),
    "--eval-interval": ("eval_interval", "steps between evaluations, 0 = never"),
    "--save-interval": ("save_interval", "steps between checkpoints, 0 = only at the end"),
    "--seed": ("seed", "seed of data order and weights"),
}
_SWITCHES = {
    "--full-text-stack": (
        {f"model.enable_{part}": True for part in ("vq", "graph", "moe", "attention")},
        "with VQ bridge, MoEGraph, experts and attention, but for what --no-... leaves out",
    ),
    "--profile": ({"profile": True}, "write where the time of one step goes to profile.txt"),
    "--no-save": ({"save": False}, "write no checkpoint"),
    "--no-vq": ({"model.enable_vq": False}, "without the VQ bridge"),
    "--no-graph": ({"model.enable_graph": False}, "without MoEGraph"),
    "--no-moe": ({"model.enable_moe": False}, "without experts"),
    "--no-attention": ({"model.enable_attention": False}, "without attention"),
    "--enable-output-router": ({"model.enable_output_router": True}, "with the output router"),
}


def load_run_config(
    job: str,
    arguments: Sequence[str],
    defaults: Mapping[str, Any],
    about: str,
    in_job: bool | None = None,
) -> RunConfig:
    """The configuration that a job's command line asks for.

    `defaults` stand in for the YAML file when none is named; what they say of the model, the parts
    that the job does without, holds with a file too, unless the file asks for them. The run's name
    is `--run`, else the file's, else the job's.
    """
    options = _parser(job, about).parse_intermixed_args(arguments)
    files = [word for word in options.words if "=" not in word]
    if len(files) > 1:
        raise UserError(f"expected one CONFIG file, got {' and '.join(files)}")
    values = read_yaml(files[0]) if files else _copy(defaults)
    if files and "model" in defaults:
        values["model"] = _copy(defaults["model"]) | dict(values.get("model") or {})
    values.setdefault("name", Path(files[0]).stem if files else job)
    set_values(values, options.words)
    for flag, value in vars(options).items():
        if value is not None and flag != "words":
            _apply_flag(values, "--" + flag.replace("_", "-"), value)
    in_job = IN_JOB in os.environ if in_job is None else in_job
    if encoder := (values.get("model") or {}).get("image_encoder"):
        values["model"]["image_encoder"] = _absolute("model.image_encoder", encoder, in_job)
    values["storage"] = _folder("storage", values.get("storage") or RunConfig.storage, in_job)
    if values.get("init_from"):
        values["init_from"] = _folder("init_from", values["init_from"], in_job)
    return build(RunConfig, values)


def read_run_config(path: Path) -> RunConfig:
    """The configuration of the run whose folder, or whose checkpoint's folder, `path` is."""
    for folder in (path, path.absolute().parent.parent):
        if (folder / CONFIG).is_file():
            config = read_config_file(folder / CONFIG)
            folder = folder.absolute()  # it may have been moved
            return replace(config, storage=str(folder.parent), name=folder.name)
    raise UserError(f"{path}: no {CONFIG} of a run there; give a run's folder")


def read_config_file(path: Path) -> RunConfig:
    """The configuration that a run wrote down."""
    values = read_yaml(path)
    if "name" not in values:
        raise UserError(
            f"{path}: is empty or cut off; write `config` of a checkpoint's manifest.json into it"
            " or, without a checkpoint, delete the folder"
        )
    return build(RunConfig, values)


def _folder(key: str, path: Any, in_job: bool) -> str:
    if "://" in str(path):
        raise UserError(
            f"{key}: {path} is not a folder; give a path that every node mounts, and"
            " mirror=s3://... for a copy in an object store"
        )
    return _absolute(key, path, in_job)


def _absolute(key: str, given: Any, in_job: bool) -> str:
    """The absolute path; refuses one that would be in the job's copy of the working directory."""
    path = Path(os.path.expanduser(str(given)))
    if in_job and not path.is_absolute():
        raise UserError(
            f"{key}: {path} would vanish with the job's working directory; give an absolute path"
            f" that every node mounts: {key}=/mnt/{path}"
        )
    return str(path.absolute())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `python -m ray_jobs.{self.prog} --help` lists what it takes")


def _parser(job: str, about: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=job, description=about, allow_abbrev=False)
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG | key.path=value", help="a YAML file, and overrides"
    )
    for flag, (path, meaning) in _FLAGS.items():
        parser.add_argument(flag, metavar="X", help=f"{meaning} ({path})")
    for flag, (_, meaning) in _SWITCHES.items():
        parser.add_argument(flag, action="store_true", default=None, help=meaning)
    for modality in MODALITIES:
        source = f"data.sources.{modality}"
        parser.add_argument(f"--{modality}-data", metavar="PATH", help=f"{source}.path")
        parser.add_argument(f"--{modality}-weight", metavar="W", help=f"{source}.weight")
    return parser


def _apply_flag(values: dict[str, Any], flag: str, value: Any) -> None:
    if flag in _SWITCHES:
        for path, setting in _SWITCHES[flag][0].items():
            set_value(values, path, setting)
    elif flag in _FLAGS:
        set_value(values, _FLAGS[flag][0], value if flag == "--run" else parse_value(value))
    else:
        modality, key = flag.removeprefix("--").split("-")
        path = f"data.sources.{modality}"
        set_value(values, f"{path}.modality", modality)
        if key == "data":
            set_value(values, f"{path}.path", value)
        else:
            set_value(values, f"{path}.weight", parse_value(value))


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}
