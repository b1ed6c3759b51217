# make demo [DATA=FOLDER]   installs and runs the main job, on generated data or on a folder
# make test                 installs what the tests need and runs them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test
demo: $(VENV)/installed
	$(BIN)/confkd demo $(if $(DATA),--data "$(DATA)")

test: $(VENV)/installed-test
	$(BIN)/python -m pytest $(ARGS)

# nnU-Net, PyTorch and what they need: about 6 GB, some minutes, once
$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 10), 'Python 3.10 or newer is needed; name one by PYTHON=...'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip setuptools
	$(BIN)/python -m pip install -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install -e ".[test]"
	touch $@
