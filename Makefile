# make demo   look inside the built-in model: set-up, quickstart, one reading
# make test   the tests (make test-all: the slow ones too); JOBS=2 of them at a time
# make interop  SAELens, in an environment of its own, reads what we write and the other way round
# make check  format, lint, types, floors and budgets
# Each makes .venv and installs what it needs.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
INTEROP := .venv-interop
BIN := $(VENV)/bin
DEMO_SUITE := suites/microworld-it
HEADLINE := SCIENCE: Study of the chromosome surprises researchers in Daegu
# Processes side by side, of one thread each: matrix products then have the same bits on every machine of a kind.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-all interop check bench docs clean

demo: $(VENV)/.installed
	$(BIN)/gemscope quickstart --model microworld-it --out $(DEMO_SUITE)
	$(BIN)/gemscope look "$(HEADLINE)" --suite $(DEMO_SUITE)

test: $(VENV)/.dev
	$(TESTS) -m "not slow"

test-all: $(VENV)/.dev
	$(TESTS)

interop: $(INTEROP)/.installed
	$(INTEROP)/bin/python -m pytest tests/interop

check: $(VENV)/.dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest tests/unit/test_budgets.py

bench: $(VENV)/.installed
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script --json || exit 1; done

docs: $(VENV)/.dev
	$(PIP) --editable ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(INTEROP) build dist site suites .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "gemscope needs Python 3.11 or newer; run: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# torch comes first, from its pinned file: asked for as a range it would bring gigabytes of CUDA.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing gemscope into $(VENV) (a few minutes the first time)"
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --editable ".[dev]"
	touch $@

$(INTEROP)/.installed: pyproject.toml constraints.txt
	@echo "installing SAELens beside gemscope into $(INTEROP) (a few minutes the first time)"
	$(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(INTEROP)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		sae-lens==6.54.12 pytest beartype --editable .
	touch $@
