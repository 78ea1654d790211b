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

# ACT on the built-in Push-T demonstrations. Goes on with `make train ARGS=--config.resume=True`.
train: install
	$(BIN)/python -m lerobot_jax.train --config=configs/act_pusht.py:state $(ARGS)

test: install
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
