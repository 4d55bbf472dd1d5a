"""Runs handed in to a real cluster on this machine, and the RayJob for Kubernetes."""

import json
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from mlflow.tracking import MlflowClient

from arbitor.errors import UserError
from arbitor.settings import build
from ray_jobs.config import RunConfig
from ray_jobs.journal import JournalReader
from ray_jobs.run import exit_with_message
from ray_jobs.submit import authorization, main
from tests.ray_jobs.ray_cluster import ray_head_with_dashboard

ROOT = Path(__file__).parents[2]
STEPS = 400
SMALL = [
    *("--job", "text", f"--steps={STEPS}", "--batch=1", "--ctx=8", "--save-interval=5"),
    *("--eval-interval=0", "--log-interval=50", "--run=handed-in", "model.width=64"),
    *("model.num_layers=1", "data.slots_per_step=1", "scaling.threads_per_worker=1"),
]


@pytest.fixture(scope="module")
def head():
    with ray_head_with_dashboard() as head:
        yield head


@pytest.fixture
def submit(head, monkeypatch, capsys):
    """`python -m ray_jobs.submit WORDS` on that cluster: its exit code and what it prints."""
    monkeypatch.chdir(ROOT)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, head.environment[name])

    def call(*words):
        code = 0
        try:
            exit_with_message(lambda: main(list(words)))
        except SystemExit as error:
            code = error.code
        output = capsys.readouterr()
        return code, output.out + output.err

    return call


def wait_for_steps(folder, count):
    deadline = time.monotonic() + 200
    while len(list(JournalReader(folder).read())) < count:
        assert time.monotonic() < deadline, "the job does not train"
        time.sleep(0.1)


def test_submitted_stopped_and_submitted_again_is_one_run(submit, tmp_path):
    words = [*SMALL, f"storage={tmp_path}"]
    folder = tmp_path / "handed-in"
    code, output = submit(*words)
    assert code == 0 and f"run folder: {folder}" in output, output
    wait_for_steps(folder, 20)
    code, output = submit(*words)
    assert code == 2 and "trains this run; --stop it first" in output
    code, output = submit("--stop", "handed-in")
    assert code == 0 and "STOPPED; the same submit resumes it" in output, output
    done = len(list(JournalReader(folder).read()))
    assert 20 <= done < STEPS
    note = json.loads((folder / "mlflow.json").read_text())
    client = MlflowClient(note["tracking_uri"])
    assert client.get_run(note["run_id"]).info.status == "KILLED"

    code, output = submit(*words, "--follow")
    assert code == 0 and output.rstrip().endswith("SUCCEEDED"), output
    assert "resuming after step" in output and f"{STEPS} steps done" in output
    _, listed = submit("--list")
    assert [line.split()[1] for line in listed.splitlines()] == ["STOPPED", "SUCCEEDED"]
    assert submit("--status", "handed-in")[1] == listed.splitlines()[1] + "\n"
    steps = [record.step for record in JournalReader(folder).read()]
    assert steps == list(range(1, STEPS + 1))
    points = client.get_metric_history(note["run_id"], "loss/total")
    assert [point.step for point in points] == steps
    experiment = client.get_experiment_by_name("arbitor").experiment_id
    assert len(client.search_runs([experiment])) == 1
    assert client.get_run(note["run_id"]).info.status == "FINISHED"
    assert "report.html" in [file.path for file in client.list_artifacts(note["run_id"])]


def test_a_wrong_token_is_told(submit, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "not-the-one-that-the-cluster-has")
    code, output = submit("--list")
    assert code == 2 and "wants another token" in output


def test_a_token_is_sent_where_ray_finds_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert authorization() == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-home\n")
    assert authorization() == {"Authorization": "Bearer of-home"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-variable")
    assert authorization() == {"Authorization": "Bearer of-variable"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert authorization() == {}


def test_what_would_vanish_is_refused_before_it_is_submitted(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    for word in ("storage=runs", "init_from=runs/first", "storage=s3://bucket/runs"):
        with pytest.raises(UserError, match=word.replace("=", ": ")):
            main([*SMALL, f"storage={tmp_path}", word])
    (tmp_path / "outside.yaml").write_text("steps: 1")
    with pytest.raises(UserError, match="outside.yaml: give a path in this folder"):
        main([str(tmp_path / "outside.yaml"), f"storage={tmp_path}"])


def test_no_cluster_is_told(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8")  # --address goes before it
    with pytest.raises(UserError, match="127.0.0.1:9: no Ray dashboard that takes jobs"):
        main([*SMALL, f"storage={tmp_path}", "--address", "http://127.0.0.1:9"])


@pytest.mark.parametrize(("asked", "fewest", "most"), [("4", 4, 4), ("[1,4]", 1, 4)])
def test_a_ray_job_for_kubernetes(asked, fewest, most, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["configs/pretrain.yaml", "--run", "Long_Run.1", "storage=/mnt/runs"]
    words += [f"scaling.num_workers={asked}", "scaling.use_gpu=true", "data.slots_per_step=8"]
    words += ["--kuberay", "--image", "registry/arbitor:1", "--volume-claim", "runs"]
    main(words)
    config_map, job = yaml.safe_load_all(capsys.readouterr().out)
    schema = json.loads((Path(__file__).parent / "rayjob_schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(job)

    config = build(RunConfig, yaml.safe_load(config_map["data"]["config.yaml"]))
    assert config.name == "Long_Run.1" and config.storage == "/mnt/runs"
    assert job["metadata"]["name"] == "long-run-1"
    spec = job["spec"]
    assert spec["backoffLimit"] > 0 and spec["entrypoint"].endswith("/etc/arbitor/config.yaml")
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (fewest, most)
    assert workers["replicas"] == most and workers["rayStartParams"] == {"num-cpus": "1"}
    for template in (workers["template"], spec["rayClusterSpec"]["headGroupSpec"]["template"]):
        (container,) = template["spec"]["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["storage"] == "/mnt/runs" and mounts["config"] == "/etc/arbitor"
        assert mounts.keys() == {volume["name"] for volume in template["spec"]["volumes"]}
        assert container["envFrom"] == [
            {"secretRef": {"name": "long-run-1-secrets", "optional": True}}
        ]
    assert workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]

    broken = json.loads(json.dumps(job))
    broken["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["container"] = []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(broken)
