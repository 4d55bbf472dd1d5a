"""An object store on this machine: moto's server."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.fs
import pytest


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """s3://shards, on a server of its own that the environment points at, as users do it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as output:
        program = Path(sys.executable).with_name("moto_server")
        server = subprocess.Popen([program, "-p", "0"], stdout=output, stderr=output)
    try:
        address = _address(server, log)
        store = pyarrow.fs.S3FileSystem(
            access_key="any",
            secret_key="any",
            endpoint_override=address,
            scheme="http",
            allow_bucket_creation=True,
            allow_delayed_open=True,  # else moto takes half a minute for a file
        )
        store.create_dir("shards")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
            patch.setenv("AWS_ACCESS_KEY_ID", "any")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            yield store
    finally:
        server.terminate()
        server.wait()


def _address(server: subprocess.Popen, log) -> str:
    """Where it listens, once it says so."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.poll() is None:
        if said := re.search(r"http://(127\.0\.0\.1:\d+)", log.read_text()):
            return said[1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start: {log.read_text()}")
