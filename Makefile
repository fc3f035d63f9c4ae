# One command to see it work on a real model, one to pass its tests:
#   make demo
#   make test
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin
# auto: the default build of torch where nvidia-smi answers, a CPU build elsewhere; or cpu, or gpu.
DEVICE ?= auto
# on: the versions of constraints/locked.txt; off: pip chooses.
LOCK   ?= on

.PHONY: setup lock demo test lint unit bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints/tested.txt constraints/locked.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" VENV="$(VENV)" DEVICE="$(DEVICE)" LOCK="$(LOCK)" bash scripts/setup.sh
	@touch $@

lock:
	PYTHON="$(PYTHON)" bash scripts/lock.sh

demo: setup
	PYTHON="$(BIN)/python" bash examples/smollm2/demo.sh

test: setup lint unit

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit:
	$(BIN)/python -m pytest -q

bench: demo
	$(BIN)/pip install --quiet -c constraints/tested.txt -e '.[bench]'
	for name in rotation iteration linear scaling memory layer14b reweighting; do $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
