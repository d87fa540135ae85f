# make demo | make test | make test-faults | make docs | make lint | make clean. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
# test files at a time; each of them may start a Ray of its own
JOBS ?= 2
BIN := $(VENV)/bin

.PHONY: install install-test demo test test-faults docs lint clean

install: $(VENV)/.installed

install-test: $(VENV)/.installed-test

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "fl_ray needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

demo: install
	$(BIN)/fl-ray compare experiments/genfl/digits.yaml --seeds 0 1 2 --output runs/demo --generator.cache runs/demo-cache

test: install-test
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

test-faults: install-test
	$(BIN)/python -m pytest tests/faults

docs: install-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs.yml

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs site mlruns mlflow.db build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
