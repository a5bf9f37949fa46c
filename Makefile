# make demo   installs into .venv and runs the main job on the shipped sample
# make test   installs into .venv and runs the tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OPTIMUM := .envs/optimum
# torch first and by its exact version: any other spelling lets pip pull several gigabytes of CUDA packages onto a CPU machine
TORCH  ?= torch==2.13.0
# bytecode is made when something is imported; for the whole of torch it would take long
PIP    := -m pip install -q --no-compile
OUT    ?= demo-output
# the Triton server of the tests, whose numpy is older than theirs; its wheel is for Linux and Python below 3.13
TRITON := .envs/triton
HAS_TRITON := $(shell $(PYTHON) -c 'import sys; print(sys.platform == "linux" and sys.version_info < (3, 13) or "")')

.PHONY: demo environments test lint format bench clean
.DEFAULT_GOAL := demo

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) "$(TORCH)"
	touch $@

$(VENV)/.run: $(VENV)/.python pyproject.toml
	$(BIN)/python $(PIP) -e ".[onnxruntime]" "$(TORCH)"
	touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml
	$(BIN)/python $(PIP) -e ".[dev]" "$(TORCH)"
	touch $@ $(VENV)/.run

demo: $(VENV)/.run
	$(BIN)/trexport demo -o $(OUT) --overwrite

# optimum wants an older transformers and diffusers than the newest: a world of its own, for the tests of what it loads
$(OPTIMUM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python $(PIP) "$(TORCH)"
	$(OPTIMUM)/bin/python $(PIP) -e ".[optimum]" "$(TORCH)"
	touch $@

$(TRITON)/.ready: pyproject.toml
	$(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python $(PIP) "$(TORCH)"
	$(TRITON)/bin/python $(PIP) -e ".[onnxruntime,triton]" "$(TORCH)"
	touch $@

# every environment of the tests; with -j all at once
environments: $(VENV)/.dev $(OPTIMUM)/.ready $(if $(HAS_TRITON),$(TRITON)/.ready)

test: environments
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev $(if $(HAS_TRITON),$(TRITON)/.ready)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .envs $(OUT) build dist
