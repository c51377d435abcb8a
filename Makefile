# `make demo` and `make test` need Python >= 3.11 and make; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .cache/peers

.PHONY: demo test test-all lint parity setup clean

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

# A module's tests stay together while they can: its fixtures and programs are made once.
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal \
  tests --ignore tests/parity

# Every behaviour once.
test: setup
	$(PYTEST) -m "not slow"

# And every case of it: whole sweeps, other sizes, more processes killed. PICK="-m slow": those only.
test-all: setup
	$(PYTEST) $(PICK)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# Checks against other people's code, which it installs, and the table of what they measured.
# PyTorch first, by its exact version: that one has a build for the CPU alone. open_clip comes
# without what it depends on, since it asks for torchvision, which has no such build. Other peers
# stand aside in .cache, each in a folder of its own: torch-fidelity would put a package `tests`
# beside ours, of torchvision only the Python code can be used, TensorFlow runs in a process of its
# own, diffusers 0.37.1 is the last that opens a whole Karlo folder, and of what DALLE2-pytorch
# depends on its networks need two packages.
parity: setup
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev,parity]'
	$(BIN)/python -m pip install --quiet --no-deps open_clip_torch==3.3.0
	test -d $(PEERS)/torch-fidelity-0.4.0 || $(BIN)/python -m pip install --quiet --no-deps \
	  --target $(PEERS)/torch-fidelity-0.4.0 torch-fidelity==0.4.0
	test -d $(PEERS)/torchvision-0.28.0 || $(BIN)/python -m pip install --quiet --no-deps \
	  --target $(PEERS)/torchvision-0.28.0 torchvision==0.28.0
	test -d $(PEERS)/pytorch-fid-0.3.0 || $(BIN)/python -m pip install --quiet --no-deps \
	  --target $(PEERS)/pytorch-fid-0.3.0 pytorch-fid==0.3.0
	test -d $(PEERS)/clean-fid-0.1.35 || $(BIN)/python -m pip install --quiet --no-deps \
	  --target $(PEERS)/clean-fid-0.1.35 clean-fid==0.1.35
	test -d $(PEERS)/torchmetrics-1.9.0 || $(BIN)/python -m pip install --quiet --no-deps \
	  --target $(PEERS)/torchmetrics-1.9.0 torchmetrics==1.9.0 lightning-utilities==0.15.3
	test -d $(PEERS)/prdc-0.2 || $(BIN)/python -m pip install --quiet --no-deps \
	  --target $(PEERS)/prdc-0.2 prdc==0.2 \
	  scikit-learn==1.9.1 joblib==1.6.0 threadpoolctl==3.8.0 narwhals==2.29.0
	test -d $(PEERS)/tensorflow-cpu-2.21.0 || $(BIN)/python -m pip install --quiet \
	  --target $(PEERS)/tensorflow-cpu-2.21.0 tensorflow-cpu==2.21.0
	test -d $(PEERS)/diffusers-0.37.1 || $(BIN)/python -m pip install --quiet --no-deps \
	  --target $(PEERS)/diffusers-0.37.1 \
	  diffusers==0.37.1 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.9.0
	test -d $(PEERS)/dalle2-pytorch-1.15.6 || $(BIN)/python -m pip install --quiet --no-deps \
	  --target $(PEERS)/dalle2-pytorch-1.15.6 \
	  dalle2-pytorch==1.15.6 rotary-embedding-torch==0.9.1 einops==0.8.2
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 tests/parity

clean:
	rm -rf $(VENV) runs build *.egg-info .cache .pytest_cache .ruff_cache
