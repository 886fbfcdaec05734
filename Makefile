# A fresh machine needs only Python 3.11 to 3.13 (with venv) and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One thread a process: small tensors run several times slower when processes share cores.
export OMP_NUM_THREADS := 1
export MPLBACKEND := Agg

# What a developer needs between two edits: the lower rooms with their doctests, and one fit.
QUICK := pplvi/types.py pplvi/weights pplvi/objectives pplvi/programs \
	tests/weights tests/objectives tests/programs \
	tests/fitting/test_fit.py::test_equal_to_a_loop_by_hand_to_the_bit

.PHONY: demo docs test test-all test-quick fuzz mutants lint format clean

demo: $(STAMP)
	$(BIN)/python -m pplvi.demo --out out

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations 20

# With the rest of the tables of which `make test` runs a part.
test-all: lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m ""

# Hostile values, 36,000 of them, for every argument of every public name.
fuzz: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "" tests/project/test_hostile_values.py

# A hundred small faults, each of which the tests of its room have to notice; takes an hour.
mutants: $(STAMP)
	$(BIN)/python tests/mutants.py

test-quick: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow and not exhaustive" $(QUICK)

# The site in docs/_build/html, tutorials and pages executed; warnings are errors. It needs no network.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --jobs auto -q docs docs/_build/html

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out docs/_build docs/api/names .pytest_cache .mypy_cache .ruff_cache

# torch goes first and alone, so that no later requirement can pull another (CUDA) build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $(STAMP)

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	touch $(VENV)/.docs
