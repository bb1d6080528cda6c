# `make train` learns English on two CPU cores; `make test` proves the house.
# On a fresh machine each first creates .venv and installs what it needs, with the versions
# in requirements/constraints.txt. Stamps in .venv keep that from happening twice.

# Any Python from 3.11 on; only used to create .venv.
PYTHON ?= python3
WORKDIR ?= runs/cpu_smoke
# Processes of the test suite.
WORKERS ?= 2
# More arguments for `train` and `test`: make test ARGS="-m slow".
ARGS ?=

VENV := .venv
TF_VENV := .venv-tf
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --constraint requirements/constraints.txt
DESCRIPTION := pyproject.toml setup.cfg requirements/constraints.txt
TORCH := $(shell grep -o 'torch==[0-9.]*' pyproject.toml)

# Tests that compare with TensorFlow's files run it in its own environment, where there is one.
ifneq ($(wildcard $(TF_VENV)/bin/python),)
export NEO_JAX_TF_PYTHON ?= $(CURDIR)/$(TF_VENV)/bin/python
endif

.DEFAULT_GOAL := help
.PHONY: help train test lint format plan site oracle tf-env clean

help: ## List these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

train: $(VENV)/.core ## Train, evaluate and sample experiments/cpu_smoke.py; again: resume
	$(BIN)/python -m neo_jax.main --config cpu_smoke --workdir $(WORKDIR) $(ARGS)

test: $(VENV)/.test ## Run the test suite; ARGS="-m slow" runs the long ones
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.dev ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(VENV)/.dev ## Format the code and mend what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

site: $(VENV)/.docs ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

plan: $(VENV)/.plan ## Add the TPU compiler, which `neo-jax plan` and its tests ask

oracle: $(VENV)/.oracle ## Add torch, transformers and others, which the tests compare with

tf-env: $(TF_VENV)/.tf ## Make the environment of TensorFlow, apart, for the TFDS tests

clean: ## Remove the environments and every build product; runs/ stays
	rm -rf $(VENV) $(TF_VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: say make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: $(VENV)/.created $(DESCRIPTION)
	$(BIN)/python $(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.created $(DESCRIPTION)
	$(BIN)/python $(PIP_INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/.core

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.test
	$(BIN)/python $(PIP_INSTALL) --editable '.[docs]'
	@touch $@

# torch first and alone: what depends on it then finds it, and pip never looks for another.
$(VENV)/.oracle: $(VENV)/.test
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python $(PIP_INSTALL) --editable '.[oracle,gcs]'
	@touch $@

# The TPU compiler: what `neo-jax plan` and its tests ask.
$(VENV)/.plan: $(VENV)/.core
	$(BIN)/python $(PIP_INSTALL) --editable '.[plan]'
	@touch $@

$(TF_VENV)/.tf: $(DESCRIPTION)
	$(PYTHON) -m venv $(TF_VENV)
	$(TF_VENV)/bin/python $(PIP_INSTALL) --editable '.[tf]'
	@touch $@
