"""Fixtures that all tests share. No test reaches a hub: without a network the libraries would wait for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import PROJECT, RECIPES
from tests.processes import kill_with_children

# The Trainer classes that recipes use.
TRAINERS = ("NextItemTrainer", "ILoraTrainer", "DistillationTrainer")

for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(variable, "1")  # read when the libraries are imported, which no test has done yet

from transformers import set_seed  # noqa: E402

from tests.faulty_server import dead_url, server  # noqa: E402, F401 - fixtures


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test draws the same numbers, alone, in another order or on another worker."""
    set_seed(0)


@pytest.fixture(scope="session")
def run_recipe():
    """Runs a recipe in this process: `run_recipe("train_sasrec", data_dir=..., output_dir=..., hidden_size=16)`.

    The settings become the words of a command line: a list gives several values, and None leaves a setting out. An
    error of the recipe is raised here. Returns a `RecipeRun`. The recipe does not set up logging.
    """
    from hf_ilora.runs.recipe_files import load_recipe
    from tests.recipe_runs import RecipeRun, recipe_words

    def run(name: str, /, **settings) -> RecipeRun:
        recipe, built = load_recipe(RECIPES / f"{name}.py"), []

        def keeping(trainer_class):
            def build(*arguments, **named_arguments):
                built.append(trainer_class(*arguments, **named_arguments))
                return built[-1]

            return build

        with pytest.MonkeyPatch.context() as patch:
            for trainer in TRAINERS:
                if trainer in vars(recipe):
                    patch.setattr(recipe, trainer, keeping(vars(recipe)[trainer]))
            patch.setattr(recipe, "set_up_logging", lambda output_dir: None, raising=False)
            patch.setattr(sys, "argv", [f"{name}.py", *recipe_words(**settings)])
            recipe.main()
        output_dir = settings.get("output_dir")
        return RecipeRun(None if output_dir is None else Path(output_dir), built[0] if built else None)

    return run


@pytest.fixture(scope="session")
def start_recipe():
    """Runs a recipe as a process, `python recipes/<name>.py`, to its end; returns the finished process, failed or not.

    The settings are those of `run_recipe`; `working_dir` is the folder it is started in.
    """
    from tests.recipe_runs import ENVIRONMENT, recipe_command

    def run(name: str, /, working_dir: Path = PROJECT, **settings) -> subprocess.CompletedProcess:
        return subprocess.run(
            recipe_command(name, **settings),
            env=os.environ | ENVIRONMENT,
            cwd=working_dir,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def launch():
    """Runs `accelerate launch --config_file accelerate_configs/<config> <program and arguments>` to its end.

    Returns the finished process with what it printed, standard error included; a failed launch fails the test.
    """

    def run(config: str, *program: str | Path, timeout_seconds: float = 600) -> subprocess.CompletedProcess:
        if Path(config).name.startswith("zero") and " " in sys.prefix:
            pytest.skip(f"torch cannot compile DeepSpeed's operation with a space in a path: {sys.prefix}")
        programs = Path(sys.executable).parent
        config_file = PROJECT / "accelerate_configs" / config
        if config == "fsdp2_cpu.yaml":
            config_file = PROJECT / "tests" / "distributed" / config
            program = (PROJECT / "tests" / "distributed" / "fsdp_on_cpu.py", *program)
        command = [str(word) for word in (programs / "accelerate", "launch", "--config_file", config_file, *program)]
        environment = os.environ | {
            # pytest may run without the environment's programs on PATH: DeepSpeed compiles with its ninja
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            # DeepSpeed compiles paths of this environment in, so another environment must not find the result
            "TORCH_EXTENSIONS_DIR": f"{sys.prefix}/torch_extensions",
        }
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            kill_with_children(process)
            output, _ = process.communicate()
            pytest.fail(f"{config}: no end after {timeout_seconds} s\n{output}")
        assert process.returncode == 0, output
        return subprocess.CompletedProcess(command, process.returncode, output)

    return run
