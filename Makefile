# make demo: train on the embedded digits, print the scores, write the pictures.   make test: lint, types, tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: demo test lint clean help

help:
	@echo "make demo   install into .venv, train on the embedded digits, print scores, write pictures to $(RUN)/figures"
	@echo "make test   install into .venv, run ruff, mypy and pytest"
	@echo "make clean  remove .venv, caches and runs/demo"

demo: $(VENV)/installed
	rm -rf $(RUN)
	$(BIN)/pyro-vae train --dataset digits --latent-dim 2 --hidden-dims 200,100 --optimizer adam --num-samples 600000 \
		--run-dir $(RUN)
	$(BIN)/pyro-vae evaluate $(RUN) --num-particles 1000
	$(BIN)/pyro-vae plot $(RUN)

test: lint
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV); PyTorch is large, so this may take some minutes ..."
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) with the test extra; PyTorch is large, so this may take some minutes ..."
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@ $(VENV)/installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyro_vae needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) $(RUN) .mypy_cache .ruff_cache .pytest_cache
