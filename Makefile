# `make train` and `make test` need Python 3.11 or later and nothing else: they make .venv themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install train test lint lerobot lerobot-env

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# TPU's compiler, with which tests look at programs for TPUs; those are skipped where there is none.
.venv/plan: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[plan]' || echo "TPU's compiler cannot be installed here"
	touch $@

# ACT on the built-in Push-T demonstrations. Goes on with `make train ARGS=--config.resume=True`.
train: install
	$(BIN)/python -m lerobot_jax.train --config=configs/act_pusht.py:state $(ARGS)

test: install .venv/plan
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The tests that run stock LeRobot, in an environment of its own: LEROBOT_ENV, which is made first (Python 3.12, 6 GB,
# minutes), or one that you have and name by LEROBOT_PYTHON=.../bin/python.
LEROBOT_ENV ?= $(HOME)/.cache/lerobot_jax/lerobot-0.6.1
LEROBOT_PYTHON ?= $(LEROBOT_ENV)/bin/python
LEROBOT := lerobot[dataset,training,evaluation,diffusion,multi-task-dit,peft,pusht,feetech]==0.6.1
# pyenv's python3.12 is there but does not run where another version is chosen.
PYTHON312 ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null \
	|| ls $$(pyenv prefix $$(pyenv latest 3.12 2>/dev/null) 2>/dev/null)/bin/python3.12 2>/dev/null)
BUILDING := $(LEROBOT_ENV).building
INSTALLED := $(LEROBOT_ENV)/pyproject.toml
WANTED = { echo '\# $(LEROBOT)'; cat pyproject.toml; }

lerobot: install lerobot-env
	LEROBOT_PYTHON=$(LEROBOT_PYTHON) $(BIN)/python -m pytest -m lerobot -n 2 $(ARGS)

# pyproject.toml headed by what was asked for, written last, tells that the environment is whole and has what this package needs now.
lerobot-env:
ifeq ($(LEROBOT_PYTHON),$(LEROBOT_ENV)/bin/python)
	@test -e $(INSTALLED) -o -e $(BUILDING) -o ! -e $(LEROBOT_ENV) || { echo \
	"$(LEROBOT_ENV) was not made by make lerobot; use it as it is with LEROBOT_PYTHON=$(LEROBOT_PYTHON)"; exit 1; }
	@test -e $(INSTALLED) -o -n "$(PYTHON312)" || { echo \
	"stock LeRobot needs Python 3.12: install python3.12 (with venv), or name it by PYTHON312=..."; exit 1; }
	@test -e $(INSTALLED) || { mkdir -p $(dir $(LEROBOT_ENV)) && touch $(BUILDING) && rm -rf $(LEROBOT_ENV) \
	&& $(PYTHON312) -m venv $(LEROBOT_ENV); }
	@$(WANTED) | cmp -s - $(INSTALLED) || { echo "installing $(LEROBOT) into $(LEROBOT_ENV)" \
	&& $(LEROBOT_PYTHON) -m pip install --quiet '$(LEROBOT)' --editable . && $(WANTED) > $(INSTALLED); }
	@rm -f $(BUILDING)
endif
