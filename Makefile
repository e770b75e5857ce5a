# Two commands do everything: `make demo` and `make test`. Both set up .venv first; a second run installs nothing.
# Any of them takes PYTHON=python3.12, or python3.13, which bring the next megatron-core, and another place as VENV=.venv312.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(notdir $(PYTHON))
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

ifeq ($(SETUP),no)
RUN := PYTHONPATH=$(CURDIR):$(PYTHONPATH) $(PYTHON)
else
RUN := $(BIN)/python
endif

.PHONY: help setup demo miniature test test-quick test-next gpu faults long soak fuzz lint clean

help:
	@echo "make demo       the whole pipeline in miniature, ending in runs/demo/report.html (under 8 minutes on two cores)"
	@echo "make miniature  every method on five seeds, into runs/miniature/results (under 100 minutes on two cores, restartable)"
	@echo "make test       every test that needs no GPU (10 to 25 minutes on two cores)"
	@echo "make test-quick the part of them that starts few processes (two minutes on two cores)"
	@echo "make test-next  every trainer's curve on the next megatron-core, under this Python (three minutes on two cores)"
	@echo "make gpu        on a machine with a CUDA GPU: its tests and benchmark, into runs/gpu (under 8 minutes on one H200);"
	@echo "                make gpu SETUP=no PYTHON=python3 makes no .venv and takes that Python as it is (docs/gpu.md)"
	@echo "make faults     every stop, kill and failed save, in every phase; longer than make test"
	@echo "make long       more layouts and kinds of the tests outside tests/faults"
	@echo "make soak       a hundred random kill -9s of a PPO run, then its weights compared with a run never killed"
	@echo "make fuzz       18,000 damaged or made-up files and settings through every reader"
	@echo "make lint       formatting, lint and types"
	@echo "make setup      only create .venv with the pinned versions"

setup: $(STAMP)

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(if $(wildcard $@),,--clear) $(VENV)  # another Python than before: made anew
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[judge,test,peer]'
	touch $@

demo: setup
	$(BIN)/megatron-gil demo --output runs/demo

miniature: setup
	$(BIN)/python examples/miniature/run.py --output runs/miniature

test: setup
	$(BIN)/python -m pytest -m "not gpu and not long" -n 2 --dist loadfile --durations=10 --ignore tests/slurm
	$(BIN)/python -m pytest -m "not gpu and not long" --durations=10 tests/slurm

test-quick: setup
	$(BIN)/python -m pytest -m "not gpu and not long and not slow" -n 2 --dist loadfile

# The next megatron-core wants Python 3.12, where PyPI's torch takes 4.7 GB. Its code runs on this one, against its metadata:
# beside .venv, so that the same torch computes both engines' curves.
NEXT := $(VENV)/next

$(NEXT): $(STAMP)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python --target $@ \
	  $$(sed -En 's/^(megatron-core==[^;]+); .*>=.*/\1/p; s/^(triton==.*)/\1/p' constraints.txt)
	touch $@

test-next: $(NEXT)
	PYTHONPATH=$(CURDIR)/$(NEXT) $(BIN)/python -m pytest tests/golden/test_curves.py

# Started again it goes on with the tests that have not passed and with what is not measured yet.
gpu: $(if $(filter no,$(SETUP)),,setup)
	@failed=0; \
	$(RUN) -m pytest -m gpu tests/gpu --record runs/gpu/results.json || failed=1; \
	$(RUN) tools/bench.py gpu --resume --json runs/gpu/results.json --markdown runs/gpu/results.md || failed=1; \
	exit $$failed

faults: setup
	$(BIN)/python -m pytest -m "not gpu" tests/faults

long: setup
	$(BIN)/python -m pytest -m "long and not gpu" -n 2 --dist loadfile --ignore tests/faults

soak: setup
	$(BIN)/python -m tests.faults.soak --kills 100

fuzz: setup
	$(BIN)/python -m pytest tests/fuzz --hypothesis-profile=fuzz

lint: setup
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/pyright

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
