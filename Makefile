# make demo    the main job on the embedded model: compile, generate, evaluate
# make test    everything that CI checks
# make cross   cross compilers and emulators for the tests of other machines (Debian, as root)
# Each sets itself up on a fresh machine with Python 3.11 or newer.

PYTHON ?= python3
# the build that continuous integration is pinned to; gammac itself takes any recent torch
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= out/tiny

.PHONY: demo test setup cross clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'gammac needs Python 3.11 or newer: make PYTHON=python3.11'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/gammac compile tiny --target cpu --budget 3 -o $(OUT)
	$(BIN)/gammac run $(OUT) --prompt 'The history of' --max-new-tokens 40
	$(BIN)/gammac eval $(OUT) --text models_zoo/calibration.txt --windows 20 --reference tiny

test: setup
	$(BIN)/python -m pytest -n auto -m 'not slow and not gpu'

cross:
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends qemu-user-static \
		g++-aarch64-linux-gnu g++-riscv64-linux-gnu g++-arm-linux-gnueabihf

clean:
	rm -rf $(VENV) build out *.egg-info .mypy_cache .ruff_cache .pytest_cache
