# make demo    install into .venv and watch weight normalization beside its rivals on a small net (4 minutes)
# make test    install what the tests need and run them all
# make lint    ruff and mypy, as CI runs them
#
# PYTHON names the interpreter that makes .venv (3.11 or newer). Set-up is skipped when nothing it depends on changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NEEDS  := pyproject.toml constraints.txt
# Small nets on few cores: one thread a process is fastest, and never oversubscribes.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-compare
	$(BIN)/weightnorm compare

test: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/python -m pytest

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("weightnorm needs Python 3.11 or newer, got %d.%d; name one with make PYTHON=python3.11" % v[:2])'
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: $(NEEDS) | $(VENV)/bin/python
	@echo "installing weightnorm[$*] into $(VENV): a minute or two the first time"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) runs
