# Two commands do everything on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXPERIMENT ?= shapecanvas
LAUNCHER ?=
SEEDS ?=
ARGS ?=
RUN ?= method=conabl reg=gradproj
TESTS := $(BIN)/python -m pytest -n auto --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup run test test-long time-tests test-fast test-all test-slurm test-faults lint bench weights results reproduce-table2 docs dist

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## /\1\t/' | awk -F'\t' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install the package with pinned versions
	@echo "setup: $(VENV) is ready"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "cu_runner needs Python 3.11 to 3.13, found %d.%d; set PYTHON=" % v)'
	@echo "setup: making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: installing cu_runner and its pinned dependencies (torch alone is some GB; about two minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: setup  ## the main job: 12 styles unlearned one after another on the embedded model; RUN="method=... reg=..." for another
	@echo "run: cu-run $(RUN)"
	@$(BIN)/cu-run $(RUN)

test: setup  ## the tests of less than a second each, without network, a worker per core; five minutes on two cores
	@echo "test: pytest"
	@$(TESTS)

test-long: setup  ## the tests that take longer, by tests/long_tests.txt; some 23 minutes on two cores
	@$(TESTS) -m 'long and not slow and not slurm and not faults'

time-tests: setup  ## time every test, and write tests/long_tests.txt
	@rm -rf .times && CU_TIMES=.times $(TESTS) -m 'not slow and not slurm and not faults' && $(BIN)/python tests/time_tests.py .times

test-fast: setup  ## for whoever edits: the tests that start no command, and one small run by cu-run
	@$(TESTS) -m fast

test-all: setup  ## the tests and the slow ones, every example of the fuzzing; half an hour and more on two cores
	@CU_FUZZ=1 $(TESTS) -m 'not slurm and not faults'

test-slurm: setup  ## sweeps on a SLURM of one node: pre-empted, out of time, cancelled; ten minutes; needs root and slurm-wlm, munge
	@$(BIN)/python -m pytest -m slurm tests/sweeps/test_slurm.py

test-faults: setup  ## two hundred kills, damage of every file, a full disk at every write; prints the counts; seven minutes
	@$(BIN)/python -m pytest -m faults tests

lint: setup  ## ruff, import-linter and mypy; mypy reads torch's types once, for minutes, and then takes seconds
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

docs: setup  ## the documentation site, site/index.html; needs no network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict && echo "docs: site/index.html"

dist: setup  ## an sdist and a wheel in dist/, which install and run elsewhere
	@$(BIN)/python -m build --no-isolation --outdir dist . && ls dist

bench: setup  ## images/s, training steps/s, seconds per request, start-up times, accuracy of the fast path, peak memory
	@$(BIN)/python scripts/bench.py

weights: setup  ## build the embedded model from nothing; hours on two CPU cores, resumes
	@$(BIN)/python scripts/build_shapecanvas.py

results: setup  ## the whole matrix of methods and regularizers, hours: docs/matrix.md and the picture of the results
	@$(BIN)/python scripts/results.py

reproduce-table2: setup  ## the paper's Table 2 beside ours; resumes. EXPERIMENT=unlearncanvas ARGS="model.path=DIR ..." SEEDS=0,1,2 LAUNCHER=slurm
	@$(BIN)/cu-table table2 --run --experiment $(EXPERIMENT) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(LAUNCHER),--launcher $(LAUNCHER)) $(ARGS)
