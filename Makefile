# Two commands do everything: `make demo` and `make test`. Both set up .venv first; a second run installs nothing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help setup demo paper test faults soak fuzz lint clean

help:
	@echo "make demo    the whole pipeline in miniature, ending in runs/demo/report.html (under 10 minutes on two cores)"
	@echo "make paper   every method on five seeds, into runs/paper/results (under 100 minutes on two cores, restartable)"
	@echo "make test    every test that needs no GPU (under 10 minutes on two cores)"
	@echo "make faults  every stop, kill and failed save, in every phase; longer than make test"
	@echo "make soak    a hundred random kill -9s of a PPO run, then its weights compared with a run never killed"
	@echo "make fuzz    18,000 damaged or made-up files and settings through every reader"
	@echo "make lint    formatting, lint and types"
	@echo "make setup   only create .venv with the pinned versions"

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[judge,test,peer]'
	touch $@

demo: setup
	$(BIN)/megatron-gil demo --output runs/demo

paper: setup
	$(BIN)/python examples/paper/run.py --output runs/paper

test: setup
	$(BIN)/python -m pytest -m "not gpu and not long" -n 2 --dist loadfile --ignore tests/slurm
	$(BIN)/python -m pytest -m "not gpu and not long" tests/slurm

faults: setup
	$(BIN)/python -m pytest -m "not gpu" tests/faults

soak: setup
	$(BIN)/python -m tests.faults.soak --kills 100

fuzz: setup
	$(BIN)/python -m pytest tests/fuzz --hypothesis-profile=fuzz

lint: setup
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
