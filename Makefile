# Every target sets up what it needs in .venv by itself. Another Python: make test PYTHON=python3.12
PYTHON ?= python3
TORCH := torch==2.13.0
PYTEST_ARGS ?=
DEMO_ARGS ?=
ATTACK_ARGS ?=
SOAK_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test attack soak lint format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## install everything into .venv (the other targets do so by themselves)

demo: $(STAMP) ## choose ranks for a small model on a small data set, into runs/demo
	HF_HUB_OFFLINE=1 $(BIN)/rankwise demo --output_dir runs/demo --overwrite_output_dir $(DEMO_ARGS)

test: $(STAMP) ## run the tests but for the slow ones (those too: make test PYTEST_ARGS="-m ''")
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(PYTEST_ARGS)

attack: $(STAMP) ## kill, fill the disk, feed nonsense, and count (a small one: make attack ATTACK_ARGS="--kills 30")
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/reliability/attack.py $(ATTACK_ARGS)

soak: $(STAMP) ## run a grid for half an hour, kill it at random, and look for what is lost
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/reliability/soak.py $(SOAK_ARGS)

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## put imports and code into the format that lint asks for
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## measure what a step, an order, a --help and a cut cost
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/order_cost.py
	$(BIN)/python benchmarks/step_cost.py $(BENCH_ARGS)

clean: ## remove .venv, caches and build products (runs/ stays)
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an install that was cut short is started over. The lock goes first,
# each file checked against its hashes; without dependencies, because it leaves out some on purpose.
# torch goes last and with its own: which of CUDA's it needs depends on the build that pip takes.
$(STAMP): requirements.lock requirements-sdist.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: the pinned packages need Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module (on Debian or Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Installing the pinned packages into $(VENV): a few minutes the first time ..."
	@if [ -e $(VENV)/.unfinished ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(VENV)/.unfinished && rm -f $(STAMP)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --require-hashes --no-deps --only-binary :all: -r requirements.lock
	@$(PIP_INSTALL) --require-hashes --no-deps --no-build-isolation -r requirements-sdist.lock
	@$(PIP_INSTALL) $(TORCH)
	@$(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@mv $(VENV)/.unfinished $(STAMP)
