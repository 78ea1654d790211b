# `make train` and `make test` need Python 3.11 or later and nothing else: they make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install train test lint

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

train: install  ## train ACT on the built-in Push-T demonstrations and evaluate it, in 15 minutes on 2 cores
	$(BIN)/python -m lerobot_jax.train --config=configs/act_pusht.py:state

test: install
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
