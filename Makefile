# Two commands do all on a fresh machine: `make demo` and `make test`. Both set up .venv first.
#   PYTHON=python3.12   the interpreter that .venv is made from
#   TORCH=system        keep the torch that is installed: in .venv already, or where PYTHON finds it
PYTHON ?= python3
TORCH ?= pinned
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint .venv/constraints.txt

.PHONY: setup setup-dev demo test lint bench proofs fresh clean

setup: .venv/.installed

setup-dev: .venv/.installed-dev

.venv/constraints.txt: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moeless needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(if $(filter system,$(TORCH)),--system-site-packages) .venv
ifeq ($(TORCH),system)
	$(BIN)/python .ci/installed_torch.py constraints.txt > $@.partial
	mv $@.partial $@
else
	@$(BIN)/python -c 'import torch' 2>/dev/null || echo "PyPI's torch brings the libraries for GPUs: about 3 GB are downloaded and .venv takes 6 GB. The README shows the smaller way for machines without a GPU."
	cp constraints.txt $@
endif

.venv/.installed: pyproject.toml .venv/constraints.txt
	$(PIP) --editable .
	touch $@

# what only developers need: linter, type checker, test runner, Triton's interpreter
.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/moeless demo

test: setup-dev lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not long'

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	for program in benchmarks/bench_*.py; do $(BIN)/python $$program || exit 1; done

proofs: setup-dev
	$(BIN)/python -m pytest -m long

# as root: demo, tests and wheel on bare systems made for it; the table is in docs/machines.md
fresh:
	$(PYTHON) .ci/fresh.py --document docs/machines.md

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
