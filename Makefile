# make demo [DATA=FOLDER]     installs, and runs the main job on generated data or on a folder
# make test [ARGS=...]        installs what the tests need, and runs all tests that are not slow
# make test-all [ARGS=...]    the same with the slow tests
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-all
demo: $(VENV)/installed
	$(BIN)/confkd demo $(if $(DATA),--data "$(DATA)")

test: $(VENV)/installed-test
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/installed-test
	$(PYTEST) $(ARGS)

# nnU-Net, PyTorch and what they need are about 6 GB, and take some minutes, once.
$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 10), 'Python 3.10 or newer is needed; name one by PYTHON=...'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip setuptools
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install -e ".[test]"
	touch $@
