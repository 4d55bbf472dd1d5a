"""Runs on a Ray cluster: hand one in, watch it, stop it.

    python -m ray_jobs.submit CONFIG [key.path=value ...] [flags] [--job JOB] [--follow]
    python -m ray_jobs.submit --list | --status [ID] | --stop ID

What is handed in is the command `python -m ray_jobs.JOB CONFIG ...` with this folder as the job's
working directory. The same again resumes the run. ID is a job's, or the name of a run for its
newest job. The cluster is --address, RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265.
"""

import argparse
import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from arbitor.errors import UserError
from arbitor.settings import read_yaml
from ray_jobs import audio, diffusion, pretrain, text, vision
from ray_jobs.config import RunConfig, load_run_config
from ray_jobs.kuberay import Cluster, ray_job_manifest
from ray_jobs.run import exit_with_message
from ray_jobs.stop import grace_seconds

JOBS = {"pretrain": pretrain, "text": text, "audio": audio, "vision": vision}
JOBS |= {"diffusion": diffusion}
RUNTIME_ENV = Path("configs/runtime_env.yaml")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_POLL_SECONDS = 0.5
_GRACE_SECONDS = 30.0  # beyond what the runtime environment gives a job to stop


def main(words: list[str]) -> None:
    options, arguments = parse(words)
    if options.kuberay:
        config = load_job(options.job, arguments)
        cluster = Cluster(options.image, options.volume_claim)
        print(ray_job_manifest(options.job, config, cluster, read_yaml(RUNTIME_ENV)), end="")
    elif options.list:
        print("\n".join(map(describe, submitted(connect(options.address)))) or "no jobs")
    elif options.status is not None:
        print(describe(find(connect(options.address), options.status)))
    elif options.stop:
        stop(connect(options.address), options.stop)
    else:
        config = load_job(options.job, arguments)
        client = connect(options.address)
        identity = submit(client, options.job, arguments, config)
        print(f"submitted {identity}; run folder: {config.folder}", flush=True)
        print(f"stop it with: python -m ray_jobs.submit --stop {config.name}", flush=True)
        if options.follow:
            sys.exit(follow(client, identity))


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and the words that are for the job."""
    parser = argparse.ArgumentParser(
        prog="python -m ray_jobs.submit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--job", default="pretrain", choices=JOBS)
    parser.add_argument("--address", help="of the cluster's dashboard", metavar="URL")
    parser.add_argument("--follow", action="store_true", help="show the job's log to its end")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="the jobs of the cluster")
    what.add_argument("--status", nargs="?", const="", metavar="ID", help="of a job or the newest")
    what.add_argument("--stop", metavar="ID", help="checkpoint and end")
    what.add_argument("--kuberay", action="store_true", help="print a RayJob for Kubernetes")
    parser.add_argument("--image", help="of the pods of --kuberay, with this program installed")
    parser.add_argument("--volume-claim", help="of --kuberay, mounted as the run's storage")
    options, arguments = parser.parse_known_args(words)
    if options.kuberay and not (options.image and options.volume_claim):
        parser.error("--kuberay needs --image IMAGE and --volume-claim NAME")
    return options, arguments


def load_job(job: str, arguments: Sequence[str]) -> RunConfig:
    """The configuration that the job will have; refuses what cannot run away from this folder."""
    module = JOBS[job]
    config = load_run_config(job, arguments, module.DEFAULTS, module.__doc__, in_job=True)
    for word in arguments:
        is_file = "=" not in word and word.endswith((".yaml", ".yml"))
        inside = not Path(word).is_absolute() and Path(word).resolve().is_relative_to(Path.cwd())
        if is_file and not inside:
            raise UserError(f"{word}: give a path in this folder, which the job gets a copy of")
    return config


def connect(address: str | None) -> JobSubmissionClient:
    """The cluster's job server; with the token of Ray's, where one is configured."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # the client takes it before its argument
    try:
        return JobSubmissionClient(address, headers=authorization())
    except AuthenticationError as error:
        raise UserError(
            f"{address}: refused, because the cluster wants another token than the one in"
            " RAY_AUTH_TOKEN, in the file RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{address}: no Ray dashboard that takes jobs there ({reason})") from error


def authorization() -> dict[str, str]:
    """The header with the cluster's token, from where Ray itself looks for it."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    default = Path.home() / ".ray" / "auth_token"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", default)).expanduser()
    if not token and path.is_file():
        token = path.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def submit(
    client: JobSubmissionClient, job: str, arguments: Sequence[str], config: RunConfig
) -> str:
    """Hands the run in; its job's ID."""
    running = [found for found in submitted(client, config.name) if not found.status.is_terminal()]
    if running:
        raise UserError(
            f"{config.name}: job {running[0].submission_id} trains this run; --stop it first, or"
            " give --run another name"
        )
    if not RUNTIME_ENV.is_file():
        raise UserError(f"{RUNTIME_ENV}: not here; submit from the folder of this program's source")
    logging.getLogger("ray").setLevel(logging.ERROR)  # of how it packs the folder
    runtime_env = read_yaml(RUNTIME_ENV) | {"working_dir": "."}
    return client.submit_job(
        entrypoint=shlex.join(["python", "-m", f"ray_jobs.{job}", *arguments]),
        submission_id=f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        runtime_env=runtime_env,
        metadata={"run": config.name},
    )


def submitted(client: JobSubmissionClient, run: str = "") -> list[JobDetails]:
    """The cluster's jobs, oldest first; of one run if it is named."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    jobs = [job for job in jobs if not run or (job.metadata or {}).get("run") == run]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def find(client: JobSubmissionClient, name: str) -> JobDetails:
    """The job with this ID, the newest of the run with this name, or without a name the newest."""
    jobs = submitted(client)
    by_id = [job for job in jobs if job.submission_id == name]
    of_run = [job for job in jobs if not name or (job.metadata or {}).get("run") == name]
    if not by_id + of_run:
        known = ", ".join(str(job.submission_id) for job in jobs[-3:]) or "none"
        raise UserError(f"{name or 'status'}: no such job or run here; newest jobs: {known}")
    return (by_id or of_run)[-1]


def describe(job: JobDetails) -> str:
    """One line of --list and --status."""
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
    run = (job.metadata or {}).get("run", "-")
    line = f"{job.submission_id}  {job.status.value:<9}  started {started}  run {run}"
    failed = job.status.value == "FAILED" and job.message
    return f"{line}  {' '.join(job.message.split())[:200]}" if failed else line


def stop(client: JobSubmissionClient, name: str) -> None:
    """Signals the job and waits until it has ended."""
    job = find(client, name)
    identity = str(job.submission_id)
    if job.status.is_terminal():
        print(f"{identity} has ended already: {job.status.value}")
        return
    client.stop_job(identity)
    variables = (job.runtime_env or {}).get("env_vars") or {}
    grace = grace_seconds(variables) + _GRACE_SECONDS
    deadline = time.monotonic() + grace
    while not client.get_job_status(identity).is_terminal():
        if time.monotonic() > deadline:
            raise UserError(f"{identity}: still not stopped after {grace:.0f} s; see its log")
        time.sleep(_POLL_SECONDS)
    print(f"{identity}: {client.get_job_status(identity).value}; the same submit resumes it")


def follow(client: JobSubmissionClient, identity: str) -> int:
    """Prints the job's log to its end; the exit code of this command. Ctrl-C leaves the job be."""
    try:
        asyncio.run(_print_log(client, identity))
    except KeyboardInterrupt:
        print(f"\n{identity} goes on; follow it no more", file=sys.stderr)
        return 130
    while not client.get_job_status(identity).is_terminal():
        time.sleep(_POLL_SECONDS)
    status = client.get_job_status(identity)
    print(f"{identity}: {status.value}")
    return 0 if status.value == "SUCCEEDED" else 1


async def _print_log(client: JobSubmissionClient, identity: str) -> None:
    async for lines in client.tail_job_logs(identity):
        print(lines, end="", flush=True)


if __name__ == "__main__":
    exit_with_message(lambda: main(sys.argv[1:]))
