# Everything a developer needs. `make demo` and `make test` work in a fresh clone with Python 3.11+, make and a C++ compiler.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := $(shell find protos/luthier -name '*.proto' | sort)

.PHONY: install demo test test-fast chaos check proto bench clean

install: $(STAMP)

$(STAMP): pyproject.toml protos/pyproject.toml constraints.txt
	$(PYTHON) scripts/check_machine.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV): some minutes the first time'
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ./protos -e '.[dev,postgres]'
	touch $@

demo: install
	$(BIN)/luthier demo --report demo-report.json

# Three processes share the run: one has the stack, one the private Rays, and one everything else (tests/conftest.py says which test
# goes where). More than there may be cores, because every Ray has its waits.
test: install
	$(BIN)/python -m pytest tests -n 3 --dist loadscope --no-loadscope-reorder

test-fast: install
	$(BIN)/python -m pytest tests/unit -m 'not chaos and not postgres'

chaos: install
	$(BIN)/python -m pytest tests -m chaos

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint
	$(BIN)/python scripts/generate_stubs.py --check

proto: install
	$(BIN)/python scripts/generate_stubs.py

bench: install
	$(BIN)/python -m benchmarks

clean:
	rm -rf build protos/build *.egg-info protos/*.egg-info .pytest_cache .mypy_cache .ruff_cache
