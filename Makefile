# One command to see it work on a real model, one to pass its tests:
#   make demo
#   make test
# The Makefile's other targets: setup, lock, check, test-all, chaos, lint, fuzz, audit, docs,
# picture, bench, release-check, clean.
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# auto: the default build of torch where nvidia-smi answers, a CPU build elsewhere; or cpu, or gpu.
DEVICE ?= auto
# on: the versions of constraints/locked.txt; off: pip chooses.
LOCK   ?= on
# Processes that run tests, each with a Ray of its own; a file's tests stay in one of them.
WORKERS ?= 2
PYTEST  = $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup lock outlook demo check test test-all lint unit chaos fuzz audit docs site picture
.PHONY: bench release-check clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints/tested.txt constraints/locked.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" DEVICE="$(DEVICE)" LOCK="$(LOCK)" bash scripts/setup.sh
	@touch $@

lock:
	PYTHON="$(PYTHON)" bash scripts/lock.sh

# Before the set-up, for which it needs nothing.
outlook:
	@$(PYTHON) examples/smollm2/outlook.py

demo: outlook setup
	@PYTHON="$(BIN)/python" bash examples/smollm2/demo.sh

# Three tiers, each within the next; see CONTRIBUTING.md.
check: setup lint
	$(PYTEST) -m "not minutes and not processes"

test: setup lint unit

unit:
	$(PYTEST) -m "not minutes" --durations=20

test-all: setup lint
	$(PYTEST) --durations=60 -p tests.full_run --full-run tests/last-full-run.json

# Kills processes of runs a hundred times, and compares the models; about an hour on 2 cores.
chaos: setup
	$(BIN)/python -m pytest -q -s tests/chaos

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Each harness of tests/fuzz for FUZZ_S seconds. The fuzzer is beside .venv, as no test needs it.
FUZZ_S ?= 60
fuzz: setup
	$(BIN)/pip install --quiet --target .fuzz --no-deps 'atheris>=3'
	for name in headers pickles configurations calibration events indexes; do PYTHONPATH=".:.fuzz" $(BIN)/python -m tests.fuzz $$name -max_total_time=$(FUZZ_S) || exit 1; done

# Known weaknesses of the locked packages, by PyPI's advisories: needs the network.
audit:
	$(PYTHON) -m venv .audit
	.audit/bin/pip install --quiet 'pip-audit>=2.7'
	.audit/bin/pip-audit --requirement constraints/locked.txt --no-deps --disable-pip

# The documentation site, in site/. Any warning is an error; `--quiet` would hide them from --strict.
docs: setup site

site:
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# docs/images/report.png, of the demo's run.
picture: setup
	$(BIN)/python -m scripts.picture runs/smollm2

bench: demo
	$(BIN)/pip install --quiet -c constraints/tested.txt -e '.[bench]'
	for name in start rotation iteration linear scaling partition plans memory layer14b reweighting; do $(BIN)/python -m benchmarks.$$name || exit 1; done

# The wheel in empty environments of Python 3.10, 3.11 and 3.12.
release-check: setup
	BUILDER="$(BIN)/python" bash scripts/release_check.sh

clean:
	rm -rf $(VENV) .fuzz .audit runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
