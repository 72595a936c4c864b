# Everything happens in .venv; a stamp file makes each step run once. TORCH_INDEX chooses PyTorch's index:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu     (small CPU build on Linux)
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# compat: the checkout is a path entry, so a folder called puna beside the program does not hide it
EDITABLE := --config-settings editable_mode=compat --editable
INDEX  := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),)

.PHONY: setup quickstart test check clean

quickstart: .venv/core  ## three acts from raw text to a tuned Llama, about eight minutes with installation
	$(BIN)/puna quickstart

test: .venv/dev  ## all tests; PUNA_TEST_ASSETS=FOLDER adds those on real tokenizers and checkpoints
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

check: .venv/dev  ## lint, format, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(MAKE) --no-print-directory test

setup: .venv/dev  ## install everything a developer needs
	@echo "now: source .venv/bin/activate"

clean:
	rm -rf .venv build *.egg-info puna-quickstart

.venv/core: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("puna needs Python 3.11 or newer; this is %d.%d" % sys.version_info[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing $(TORCH) and puna into .venv (some minutes on a slow line)"
	@$(PIP) install --quiet $(INDEX) '$(TORCH)'
	@$(PIP) install --quiet --constraint constraints.txt $(EDITABLE) '.[quickstart]'
	@touch $@

.venv/dev: .venv/core
	@echo "installing the development tools into .venv"
	@$(PIP) install --quiet --constraint constraints.txt $(EDITABLE) '.[dev,quickstart]'
	@touch $@
