"""A Hub, a process with the real clients of the Hub, and folders to publish."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub_server import WRITER, HubServer
from tests.publishing.published_folders import save_sasrec_run

CLIENT = Path(__file__).with_name("hub_client.py")


class HubClient:
    """Runs programs that talk to the Hub.

    Attributes:
        hub: the server; its faults and requests are those since the test began.
        environment: variables that point the clients to the server.
    """

    def __init__(self, hub: HubServer, home: Path):
        self.hub, self.home = hub, home
        self.environment = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        settings = {
            "HF_HOME": str(home),
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, CLIENT],
            env=os.environ | self.environment | settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: str, *arguments, token: str | None = WRITER) -> tuple[bool, str]:
        """Return whether the program ended without an error, and what it printed."""
        output = self.home / "output.txt"
        request = {
            "program": program,
            "arguments": [str(argument) for argument in arguments],
            "environment": {} if token is None else {"HF_TOKEN": token},
            "output": str(output),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        exit_code = self.process.stdout.readline()
        assert exit_code, "the client's process has ended"
        return int(exit_code) == 0, output.read_text()

    def succeed(self, program: str, *arguments, token: str | None = WRITER) -> str:
        """Return what the program printed; the test fails if the program does."""
        succeeded, printed = self.run(program, *arguments, token=token)
        assert succeeded, printed
        return printed

    def fail(self, program: str, *arguments, token: str | None = WRITER) -> str:
        """Return what the program printed, with its traceback; the test fails if the program succeeds."""
        succeeded, printed = self.run(program, *arguments, token=token)
        assert not succeeded, printed
        return printed


@pytest.fixture(scope="session")
def client_process(tmp_path_factory):
    with HubServer() as hub:
        hub.start()
        client = HubClient(hub, tmp_path_factory.mktemp("home"))
        yield client
        client.process.kill()  # a regular exit of Python would take seconds
        client.process.communicate()
        hub.shutdown()


@pytest.fixture
def client(client_process):
    """The client, with an empty Hub that has no faults."""
    hub = client_process.hub
    for what in (hub.repositories, hub.renamed, hub.large_files, hub.faults, hub.requests):
        what.clear()
    return client_process


@pytest.fixture
def sasrec_run(tmp_path):
    """The folder of a finished run."""
    return save_sasrec_run(tmp_path / "sasrec_run")
