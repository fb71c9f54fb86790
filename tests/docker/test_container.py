"""The scripts of docker/, without an engine: the entrypoint runs with a copy of /etc, so that the users are its own."""

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.paths import PROJECT

DOCKER = PROJECT / "docker"
UID, GID = 23456, 23457  # of no user and no group
# A python that writes its arguments to a log, and makes an environment whose python is itself.
PYTHON = """\
#!/bin/bash
echo "$(id -u) $*" >> "$LOG"
[[ $* != *"${FAILING:-nothing fails}"* ]] || exit 1
if [[ $2 = venv ]]; then mkdir -p "$4/bin" && cp "$0" "$4/bin/python"; fi
"""
# A mount namespace of its own, in which a copy of /etc takes the place of /etc.
NAMESPACE = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc && exec "$@"']

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
        reason="needs root and mount namespaces, as a container has",
    ),
]


class Container:
    """The parts of a container: the mounted project, a volume for the environment, and /etc."""

    def __init__(self, folder):
        self.project, self.environment = folder / "project", folder / "volume" / "environment"
        self.etc, self.log = folder / "etc", folder / "log"
        folder.chmod(0o755)
        for made in (self.project, folder / "volume", self.etc):
            made.mkdir()
        os.chown(self.project, UID, GID)
        for name in ("passwd", "group", "shadow", "gshadow", "login.defs", "nsswitch.conf"):
            if os.path.exists(f"/etc/{name}"):
                shutil.copy(f"/etc/{name}", self.etc)
        (self.project / "requirements.lock").write_text("torch==1\n")
        self.log.touch()
        self.log.chmod(0o666)
        python = folder / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.variables = {
            "PROJECT_DIR": self.project, "ENVIRONMENT_DIR": self.environment, "HOME_DIR": folder / "home",
            "PYTHON": python, "LOG": self.log, "HOST_UID": UID, "HOST_GID": GID, "PATH": os.environ["PATH"],
        }  # fmt: skip

    def start(self, *command, **variables):
        given = {name: str(value) for name, value in (self.variables | variables).items() if value is not None}
        words = [*NAMESPACE, self.etc, DOCKER / "entrypoint.sh", *command]
        return subprocess.Popen(
            list(map(str, words)), env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *command, **variables):
        process = self.start(*command, **variables)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    @property
    def installations(self):
        return self.log.read_text().count("pip install --quiet --requirement")


@pytest.fixture
def container():
    with tempfile.TemporaryDirectory() as folder:  # pytest closes its own to other users
        yield Container(Path(folder))


def test_the_command_runs_as_the_user_of_the_host_and_its_files_are_that_user_s(container):
    result = container.run("bash", "-c", 'touch made; mkdir "$HOME/cache"; echo "$(id -u):$(id -g) $USER $HOME"')
    assert result.stdout == f"{UID}:{GID} hf_ilora {container.variables['HOME_DIR']}\n", result.stderr
    made = (container.project / "made").stat()
    assert (made.st_uid, made.st_gid) == (UID, GID)
    assert all(line.startswith(f"{UID} ") for line in container.log.read_text().splitlines())  # who installs


def test_a_user_and_a_group_that_the_image_has_are_taken_as_they_are(container):
    before = (container.etc / "passwd").read_text()
    result = container.run("bash", "-c", 'echo "$(id -u):$(id -g) $USER"', HOST_UID=1, HOST_GID=2)
    assert result.stdout == "1:2 daemon\n", result.stderr
    assert (container.etc / "passwd").read_text() == before


def test_a_container_that_starts_again_knows_its_user(container):
    container.run("true")
    again = container.run("id", "-un")
    assert (again.returncode, again.stdout) == (0, "hf_ilora\n"), again.stderr


def test_without_ids_the_command_runs_as_root(container):
    assert container.run("id", "-u", HOST_UID=None, HOST_GID=None).stdout == "0\n"


def test_the_lock_is_installed_when_it_is_newer_and_another_one(container):
    lock, note = container.project / "requirements.lock", container.environment / "installed"
    assert container.run("true").returncode == 0 and container.installations == 1
    assert container.run("true").returncode == 0 and container.installations == 1
    os.utime(lock, (note.stat().st_mtime + 10,) * 2)  # checked out again
    container.run("true")
    assert container.installations == 1
    lock.write_text("torch==2\n")
    os.utime(lock, (note.stat().st_mtime + 10,) * 2)
    container.run("true")
    assert container.installations == 2 and note.read_text() == "torch==2\n"


def test_a_failed_installation_ends_the_container_and_is_tried_again(container):
    failed = container.run("echo", "started", FAILING="--requirement")
    assert failed.returncode != 0 and failed.stdout == ""
    assert container.run("echo", "started").stdout == "started\n" and container.installations == 2


def test_arguments_arrive_as_they_were_given_and_the_exit_code_comes_back(container):
    words = ["two words", "*", "", "$HOME", "--help", 'a"b']
    result = container.run("bash", "-c", 'printf "<%s>" "$@"; exit 7', "name", *words)
    assert result.stdout == "".join(f"<{word}>" for word in words) and result.returncode == 7


def test_the_command_is_looked_for_in_the_environment_first(container):
    container.run("true")
    tool = container.environment / "bin" / "id"
    tool.write_text("#!/bin/sh\necho the environment\n")
    tool.chmod(0o755)
    assert container.run("id").stdout == "the environment\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_reaches_the_command(container, name):
    code = f'trap "echo stopped; exit 5" {name}; echo ready; while true; do sleep 0.05; done'
    process = container.start("bash", "-c", code)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    process.send_signal(signal.Signals[name])
    assert process.communicate(timeout=60)[0] == "stopped\n" and process.returncode == 5


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HOST_UID": "alice"}, "HOST_UID is 'alice' and HOST_GID is '23457': expected numbers"),
        ({"PROJECT_DIR": "/nowhere"}, "/nowhere/requirements.lock is not there: expected the project; mount it"),
    ],
)
def test_mistakes_end_with_code_2_and_a_message(container, variables, message):
    result = container.run("echo", "started", **variables)
    assert result.returncode == 2 and message in result.stderr and result.stdout == ""


@pytest.fixture
def start_container(tmp_path):
    """Runs start_container.sh beside a docker that notes its words; `built` tells whether there is an image."""

    def run(*command, built=True, gpu=False, **variables):
        programs = tmp_path / "programs"
        shutil.rmtree(programs, ignore_errors=True)
        programs.mkdir()
        docker = '#!/bin/bash\nprintf "%s\\n" "$*" >> "$LOG"\n' + ("" if built else "[[ $1 != image ]]\n")
        nvidia = "#!/bin/bash\nexit 0\n" if gpu else "#!/bin/bash\nexit 9\n"
        for name, text in (("docker", docker), ("nvidia-smi", nvidia)):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        log = tmp_path / "docker.log"
        log.unlink(missing_ok=True)
        environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "LOG": str(log), **variables}
        result = subprocess.run(
            [DOCKER / "start_container.sh", *command], env=environment, capture_output=True, text=True
        )
        return result, log.read_text().splitlines() if log.exists() else []

    return run


def test_the_container_gets_ids_project_volumes_and_the_command(start_container):
    result, (_, started) = start_container("hf-ilora", "pipeline", "quickstart", HF_TOKEN="secret")
    assert result.returncode == 0, result.stderr
    assert started.startswith("run --rm --init ") and started.endswith(" hf_ilora:cpu hf-ilora pipeline quickstart")
    for words in (f"HOST_UID={os.getuid()}", f"HOST_GID={os.getgid()}", f"{PROJECT}:/workspace", "--env HF_TOKEN "):
        assert words in started
    assert "secret" not in started and "--gpus" not in started and "--tty" not in started


def test_a_machine_with_a_gpu_gets_the_image_for_it(start_container):
    _, (asked, started) = start_container(gpu=True)
    assert asked == "image inspect hf_ilora:cuda" and "--gpus all" in started and started.endswith(" hf_ilora:cuda")
    _, (_, started) = start_container(gpu=True, DEVICE="cpu")
    assert "--gpus" not in started and started.endswith(" hf_ilora:cpu")


def test_a_missing_image_is_built(start_container):
    _, (_, built, started) = start_container(built=False)
    assert built == f"build --tag hf_ilora:cpu --build-arg DEVICE=cpu {DOCKER}" and started.startswith("run ")


def test_an_unknown_device_is_refused(start_container):
    result, commands = start_container(DEVICE="tpu")
    assert result.returncode == 2 and "DEVICE is 'tpu': expected cuda or cpu" in result.stderr and not commands
