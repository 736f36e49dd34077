# One command each: see README. Everything installs into $(VENV); nothing outside the clone is changed,
# except that `make test` installs Debian's chromium and PostgreSQL where it may.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8501
MLFLOW_PORT ?= 5001
HOME_DIR ?= .quire
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c deploy/constraints.txt
# Two tests at a time, a file's tests in one process, the browser's last (see tests/conftest.py).
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
CHECKED := engine workbench pages tests docs

export PORT MLFLOW_PORT HOME_DIR
# Where it is set, each of the processes that tests start would compile the product's modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: up test test-full test-gpu check format map bench bench-gpu browser clean

up: $(VENV)/.installed
	@exec $(BIN)/quire up

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Quire needs Python 3.11 or newer; set PYTHON=…" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "python -m venv failed; on Debian: apt install python3-venv" >&2; exit 2; }

$(VENV)/.installed: $(BIN)/python pyproject.toml deploy/constraints.txt
	@echo "Installing Quire into $(VENV) (once; a few minutes)"
	@$(PIP_INSTALL) -e '.[notebooks]'
	@touch $@

$(VENV)/.installed-test: $(BIN)/python pyproject.toml deploy/constraints.txt
	@echo "Installing Quire and the test tools into $(VENV) (once; a few minutes)"
	@$(PIP_INSTALL) -e '.[test,notebooks]'
	@touch $(VENV)/.installed $@

browser:
	@sh tests/browser/install_chromium.sh
	@sh tests/workbench/install_postgres.sh

$(VENV)/.installed-full: $(VENV)/.installed-test
	@echo "Installing Ray for the long proofs (once)"
	@$(PIP_INSTALL) -e '.[ray]'
	@touch $@

check: $(VENV)/.installed-test
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

map: $(VENV)/.installed
	$(BIN)/python docs/module_map.py

test:
	@$(MAKE) --no-print-directory -j2 check browser  # chromium comes while pip unpacks
	$(BIN)/python -m pytest -m "not full" $(SIDE_BY_SIDE) --durations=15

test-full: test $(VENV)/.installed-full
	$(BIN)/python -m pytest -m "full and not alone" $(SIDE_BY_SIDE) --durations=25
	$(BIN)/python -m pytest -m "full and alone" --durations=25

bench: $(VENV)/.installed-test browser
	$(BIN)/python -m engine.bench overhead
	$(BIN)/python -m engine.bench cpu
	$(BIN)/python -m workbench.bench live

# Both run with any Python that has torch, triton and transformers (test-gpu: and pytest): make bench-gpu BIN=/path/to/its/bin
test-gpu:
	$(BIN)/python -m pytest tests/gpu -p no:cacheprovider -W default

bench-gpu:
	$(BIN)/python -m engine.bench gpu --save

clean:
	rm -rf $(VENV) .venv-outside .venv-guidellm .quire .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
