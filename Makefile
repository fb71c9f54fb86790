# Every target does its own set-up: on a new machine `make quickstart` or `make test` is the only command needed.
# Needs Python 3.11 or newer with venv and pip; requirements.lock is tested on 3.11 (`make PYTHON=python3.11 setup`).
PYTHON ?= python3
.DEFAULT_GOAL := help
.PHONY: help setup environment test test-slow test-oldest coverage lint docs format help-texts quickstart clean

# The programs of .venv come first: python, accelerate, pytest, ruff, and the ninja that DeepSpeed compiles with.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Waiting threads sleep: spinning, they make small models 20 times as slow beside another busy program.
export OMP_WAIT_POLICY ?= passive

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## make .venv from requirements.lock, unless it is there and complete
	@cat $(INSTALLED) | cmp -s - .venv/installed || $(MAKE) --no-print-directory environment

# The files that determine the contents of .venv.
INSTALLED := requirements.lock setup.py pyproject.toml
# What was installed is noted last: an environment without the note is half made, one with another note is outdated.
environment:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) cannot be used: expected Python 3.11 or newer, name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	python -m pip install --disable-pip-version-check -r requirements.lock
	python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	cat $(INSTALLED) > .venv/installed

# One worker for each core, with one thread. The tests of a file stay together: they share what is costly to make.
PYTEST := python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --durations=15
test test-slow test-oldest coverage: export OMP_NUM_THREADS := 1

test: setup ## quick tests: CPU, no network, minutes
	$(PYTEST) -m "not slow"

test-slow: setup ## tests that launch processes, train, or read whole data sets
	$(PYTEST) -m slow

TESTS ?= tests
coverage: setup ## lines and branches of src that the tests reach, slow ones included; fewer with TESTS="tests/data"
	python -m coverage erase
	$(PYTEST) --cov --cov-report=html:outputs/coverage --cov-report=term $(TESTS)

# The lowest torch that pyproject.toml allows for every extra; name another one where it is at hand.
OLDEST_TORCH ?= torch==2.9.0
test-oldest: setup ## quick tests with the lowest versions that pyproject.toml allows, in .venv-oldest
	$(PYTHON) -m venv --clear .venv-oldest
	python .ci/oldest_versions.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --disable-pip-version-check \
		$(OLDEST_TORCH) --constraint .venv-oldest/constraints.txt -e ".[dev]"
	PATH="$(CURDIR)/.venv-oldest/bin:$$PATH" $(PYTEST) -m "not slow"

lint: setup ## style, types and mistakes, nothing is changed
	python -m ruff check .
	python -m ruff format --check .
	python -m mypy
	shellcheck .ci/run docker/*.sh
	hadolint docker/Dockerfile

docs: ## the documentation as a site in outputs/site, in an environment of its own; warnings are errors
	@cmp -s docs/requirements.lock .venv-docs/installed || { $(PYTHON) -m venv --clear .venv-docs \
		&& .venv-docs/bin/python -m pip install --disable-pip-version-check --quiet -r docs/requirements.lock \
		&& cp docs/requirements.lock .venv-docs/installed; }
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet

format: setup ## put the code in the project's style
	python -m ruff check --fix .
	python -m ruff format .

help-texts: setup ## write what `hf-ilora COMMAND --help` prints, after a change to the options of a recipe
	python -m hf_ilora_cli.write_help

# glibc would return large blocks after every operation and request them again, which takes longer than the arithmetic.
quickstart: export MALLOC_MMAP_THRESHOLD_ := 4000000000
quickstart: export MALLOC_TRIM_THRESHOLD_ := 16000000000
quickstart: setup ## MovieLens-100K from the ratings to a distilled SASRec, and ten recommendations for one user
	hf-ilora pipeline quickstart
	hf-ilora recommend --data_dir outputs/quickstart/data --model outputs/quickstart/publish --user 1

clean: ## remove caches and build leftovers; .venv and outputs stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .coverage* src/*.egg-info
	find src tests recipes benchmarks experiments -name __pycache__ -prune -exec rm -rf {} +
