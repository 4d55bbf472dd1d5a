"""The command line: flags are aliases of keys, precedence, and errors that name the culprit."""

from pathlib import Path

import pytest

from arbitor.errors import UserError
from arbitor.modality import MODALITIES
from arbitor.settings import build, read_yaml, write_yaml
from data_pipeline.schema import DataConfig
from ray_jobs import pretrain, text
from ray_jobs.config import RunConfig, load_run_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
CONFIGS = [path for path in CONFIGS if path.name != "runtime_env.yaml"]  # that one is for Ray


def load(*arguments, job="pretrain", defaults=pretrain.DEFAULTS):
    return load_run_config(job, arguments, defaults, "about")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_reloads_and_is_short(path, tmp_path):
    config = load(str(path))
    assert config.name == path.stem
    resolved = tmp_path / "config.yaml"
    resolved.write_text(write_yaml(config.values()))
    assert build(RunConfig, read_yaml(resolved)) == config
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_names_five_sources_that_fit_its_slots(path):
    values = read_yaml(path)["data"]
    assert set(values["sources"]) == set(MODALITIES)
    for source in values["sources"].values():
        source["weight"] = 0.2
    data = build(DataConfig, values, "data")
    for modality in MODALITIES:
        positions = data.batch_size_of(modality) * data.sequence_length_of(modality)
        assert positions == data.batch_size * data.sequence_length


def test_every_modality_has_flags_for_its_data_and_weight():
    flags = [f"--{m}-{key}" for m in MODALITIES for key in ("data", "weight")]
    values = [value for m in MODALITIES for value in (f"some/{m}", "0.5" if m == "text" else "0")]
    config = load(*(word for pair in zip(flags, values, strict=True) for word in pair))
    for modality in MODALITIES:
        source = config.data.sources[modality]
        assert (source.modality, source.path) == (modality, f"some/{modality}")
        assert source.weight == (0.5 if modality == "text" else 0)


def test_flags_beat_overrides_beat_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "steps: 1\nseed: 1\nlog_interval: 1\n"
        "data: {sources: {text: {path: 'sample://text'}}, batch_size: 1}\n"
    )
    config = load(str(path), "seed=2", "steps=2", "--steps", "3", "data.batch_size=9")
    assert (config.steps, config.seed, config.log_interval) == (3, 2, 1)
    assert config.data.batch_size == 9
    assert list(config.data.sources) == ["text"]  # the job's defaults do not leak into a file's
    assert config.name == "mine"


def test_the_classic_flags_of_the_light_text_run():
    config = load(
        *[
            "--steps",
            "2",
            "--batch",
            "1",
            "--ctx",
            "8",
            "--text-data",
            "some/file.txt",
            "--text-weight",
            "1.0",
            "--code-weight",
            "0",
            "--image-weight",
            "0",
            "--audio-weight",
            "0",
            "--video-weight",
            "0",
            "--eval-interval",
            "0",
            "--log-interval",
            "1",
            "--save-interval",
            "0",
            "--no-save",
            "--backend",
            "triton",
            "--no-vq",
            "--no-graph",
            "--no-moe",
            "--no-attention",
            "--run",
            "pretrain-smoke-lite",
        ]
    )
    assert (config.steps, config.data.batch_size, config.data.sequence_length) == (2, 1, 8)
    assert list(config.data.active_sources) == ["text"]
    assert config.data.sources["text"].path == "some/file.txt"
    assert not config.save and not config.model.enable_attention
    assert config.name == "pretrain-smoke-lite" and config.backend == "triton"
    assert Path(config.storage).is_absolute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepz=3"], "stepz: unknown configuration key; did you mean steps?"),
        (["model.widht=3"], "model.widht: unknown configuration key; did you mean model.width?"),
        (["data.sources.text.weigth=1"], "did you mean data.sources.text.weight?"),
        (["--batch", "0"], "data.batch_size: must be at least 1, not 0"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--steps", "many"], "steps: .* got 'many'"),
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--backend", "cuda"], "backend: expected one of auto, torch, triton"),
        (
            [word for m in MODALITIES for word in (f"--{m}-weight", "0")],
            "data.sources: .* weight above 0",
        ),
        (["scaling.num_workers=5"], "5 workers cannot share 4 slots a step"),
        (["scaling.num_workers=[1,5]"], "5 workers cannot share 4 slots a step"),
        (["scaling.num_workers=[3,2]"], r"at least 1, or \[smallest, largest\], got \[3, 2\]"),
        (["scaling.num_workers=[1,2,3]"], r"or \[smallest, largest\], got \[1, 2, 3\]"),
        (["scaling.num_workers=[0,2]"], r"or \[smallest, largest\], got \[0, 2\]"),
        (["scaling.num_workers=[]"], r"or \[smallest, largest\], got \[\]"),
        (["scaling.num_workers=0"], "scaling.num_workers: expected a number of at least 1"),
        (["scaling.threads_per_worker=0"], "scaling.threads_per_worker: expected at least 1"),
        (["data.slots_per_step=1000"], "data.slots_per_step: expected at most 516 .* got 1000"),
        (["none.yaml"], "none.yaml: cannot be read"),
        (["a.yaml", "b.yaml"], "expected one CONFIG file"),
        (["steps.x=1"], "steps.x: steps is a value|steps: "),
        (["--run", "a/b"], "name: expected a folder name"),
        (["update.rule=adam"], "update.rule: expected one of latent, bigint, got 'adam'"),
        (["update.latent_bits=4"], "update.latent_bits: expected 8 or 6, got 4"),
        (
            ["update.group_size=32", "model.activation=int8"],
            "update.group_size: 32 does not go with model.activation int8",
        ),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        load(*arguments)


def test_paths_are_made_absolute_and_those_that_a_job_would_lose_are_refused(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    words = ["storage=~/runs", "init_from=~/runs/first", "model.image_encoder=~/dino.safetensors"]
    for in_job in (False, True):
        config = load_run_config("text", words, text.DEFAULTS, "about", in_job)
        assert config.storage == "/home/somebody/runs"
        assert config.init_from == "/home/somebody/runs/first"
        assert config.model.image_encoder == "/home/somebody/dino.safetensors"
    for word in ("storage=runs", "init_from=first", "model.image_encoder=dino.safetensors"):
        with pytest.raises(UserError, match=f"{word.replace('=', ': ')} would vanish with the job"):
            load_run_config("text", [*words, word], text.DEFAULTS, "about", in_job=True)


PARTS = ("vq", "graph", "moe", "attention")


@pytest.mark.parametrize(
    ("flags", "built"),
    [
        ([], []),
        (["--full-text-stack"], PARTS),
        (["--full-text-stack", "--no-graph"], ["vq", "moe", "attention"]),
        (["--full-text-stack", "--no-vq", "--no-graph"], ["moe", "attention"]),
        (["--no-moe", "--no-attention", "--full-text-stack"], ["vq", "graph"]),
    ],
)
def test_the_full_text_stack_and_what_is_left_out_of_it(flags, built):
    model = load(*flags, job="text", defaults=text.DEFAULTS).model
    assert [part for part in PARTS if getattr(model, f"enable_{part}")] == list(built)


def test_a_graph_without_codes_is_refused():
    with pytest.raises(UserError, match="model.enable_graph: .* give --no-graph"):
        load("--full-text-stack", "--no-vq", job="text", defaults=text.DEFAULTS)
