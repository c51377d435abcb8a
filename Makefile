# `make demo` and `make test` need Python >= 3.11 and make; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint parity setup clean

setup: $(VENV)/.ready

$(VENV)/.ready: setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --progress-bar on --editable '.[dev]'
	@touch $@

# Trains the cascade on the embedded emoji and writes runs/demo/report.html.
demo: setup
	$(BIN)/python launch/demo.py

test: setup
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto --maxprocesses 4 tests --ignore tests/parity

lint: setup
	$(BIN)/ruff check .

# Checks against other people's code, which it installs, and the table of what they measured.
# PyTorch first, by its exact version: that one has a build for the CPU alone. Three packages come
# without what they depend on, since they ask for torchvision, which has no such build.
parity: setup
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev,parity]'
	$(BIN)/python -m pip install --quiet --no-deps open_clip_torch==3.3.0 timm==1.0.31 torch-fidelity==0.4.0
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/parity

clean:
	rm -rf $(VENV) runs build *.egg-info .cache .pytest_cache .ruff_cache
