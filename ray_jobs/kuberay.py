"""A run as a KubeRay RayJob: what `python -m ray_jobs.submit ... --kuberay` prints.

Two documents: a ConfigMap with the resolved configuration, and a RayJob (ray.io/v1) that brings a
cluster up, runs the job on it and takes it down. Where the cluster is lost, KubeRay makes another
one and the same command resumes the run, whose name and storage do not change.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import yaml

from arbitor.errors import UserError
from arbitor.settings import write_yaml
from ray_jobs.config import RunConfig

RETRIES = 20  # clusters after the first one that KubeRay makes for a run
KEEP_SECONDS = 3600  # the ended job's object, for whoever wants to read its status
CONFIG_FOLDER = "/etc/arbitor"
MEMORY = {"head": "8Gi", "worker": "32Gi"}
SHARED_MEMORY = {"head": "2Gi", "worker": "8Gi"}  # Ray's object store lies there


@dataclass(frozen=True)
class Cluster:
    """What the pods are made of: an image that holds this program, a claim for the storage."""

    image: str
    volume_claim: str


def ray_job_manifest(
    job: str, config: RunConfig, cluster: Cluster, runtime_env: Mapping[str, Any]
) -> str:
    """YAML for `kubectl apply -f -`."""
    name = object_name(config.name)
    documents = [_config_map(name, config), _ray_job(name, job, config, cluster, runtime_env)]
    return yaml.safe_dump_all(documents, sort_keys=False)


def object_name(run: str) -> str:
    """The run's name as Kubernetes takes it: lower case letters, digits and '-', at most 47."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not name or len(name) > 47:
        raise UserError(
            f"name: {run!r} makes no name of a RayJob (1 to 47 letters and digits); give --run"
            " another name"
        )
    return name


def _config_map(name: str, config: RunConfig) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config"},
        "data": {"config.yaml": write_yaml(config.values())},
    }


def _ray_job(
    name: str, job: str, config: RunConfig, cluster: Cluster, runtime_env: Mapping[str, Any]
) -> dict[str, Any]:
    # The code is in the image: nothing is uploaded.
    environment = {"env_vars": dict(runtime_env["env_vars"])}
    workers = {
        "groupName": "workers",
        "replicas": config.scaling.max_workers,  # those without room stay pending
        "minReplicas": config.scaling.min_workers,
        "maxReplicas": config.scaling.max_workers,
        "rayStartParams": {"num-cpus": "1"},  # one worker a pod; decode tasks ask for no CPU
        "template": _pod("worker", name, config, cluster),
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": f"python -m ray_jobs.{job} {CONFIG_FOLDER}/config.yaml",
            "runtimeEnvYAML": yaml.safe_dump(environment),
            "backoffLimit": RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEEP_SECONDS,
            "rayClusterSpec": {
                "rayVersion": ray.__version__,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},  # no worker trains beside the driver
                    "template": _pod("head", name, config, cluster),
                },
                "workerGroupSpecs": [workers],
            },
        },
    }


def _pod(role: str, name: str, config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """One container with the storage, the configuration and, by reference, the secrets."""
    cpus = 2 if role == "head" else config.scaling.threads_per_worker + 2  # two decode
    resources = {"cpu": str(cpus), "memory": MEMORY[role]}
    if role == "worker" and config.scaling.use_gpu:
        resources["nvidia.com/gpu"] = "1"
    container = {
        "name": f"ray-{role}",
        "image": cluster.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        # For MLflow and object stores: MLFLOW_TRACKING_TOKEN, AWS_ACCESS_KEY_ID and the like.
        "envFrom": [{"secretRef": {"name": f"{name}-secrets", "optional": True}}],
        "volumeMounts": [
            {"name": "storage", "mountPath": config.storage},
            {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if role == "head":
        container["ports"] = [
            {"name": "gcs-server", "containerPort": 6379},
            {"name": "dashboard", "containerPort": 8265},
        ]
    shared_memory = {"medium": "Memory", "sizeLimit": SHARED_MEMORY[role]}
    return {
        "spec": {
            "containers": [container],
            "volumes": [
                {
                    "name": "storage",
                    "persistentVolumeClaim": {"claimName": cluster.volume_claim},
                },
                {"name": "config", "configMap": {"name": f"{name}-config"}},
                {"name": "shared-memory", "emptyDir": shared_memory},
            ],
        }
    }
