# Qwen Edit Trainer: one command for each thing a person wants.
#
#   make demo        train the demo LoRA inside a real ComfyUI
#   make test        the whole test suite            (make test ARGS="tests/core -k pairing")
#   make test-fast   the fast tier: no server, no browser, no training
#   make comfyui     ComfyUI's page with the pack in it, for a person
#   make lint types  formatting and style; types     (needs only Python: no torch, no ComfyUI)
#   make types-torch types again, with torch and the other libraries
#   make types-web   types of the page's scripts (needs npm)
#   make docs        writes docs/settings.md, docs/job.schema.json, and the drawing in docs/architecture.md
#   make templates   writes workflows/ and subgraphs/ from tools/template_graphs/
#   make locales     writes locales/ from tools/translations/
#
# COMFYUI_DIR=folder uses that ComfyUI; TORCH=requirement installs that torch (only if there is none yet).

COMFYUI_DIR ?=
TORCH ?= torch==2.13.0
PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
# One process per core and one more, each with whole files of tests, because the tests of a file share what they set up.
# tests/conftest.py sets their order, and which files share a process.
# ARGS="-n 0" runs all in one process, as a debugger needs.
# The malloc settings keep freed memory: else a third of the time of large tensors goes into getting fresh pages.
PYTEST_ENV := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile
LINT := .venv-lint
LINT_RUN := $(LINT)/bin/python
export COMFYUI_DIR
export TORCH

.PHONY: help setup test test-fast demo comfyui lint format types types-torch types-web docs templates locales clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -14

setup:
	@$(PYTHON) tools/setup.py

test: setup
	$(PYTEST_ENV) $(RUN) $(PYTEST) $(ARGS)

test-fast: setup
	$(PYTEST_ENV) $(RUN) $(PYTEST) --fast $(ARGS)

demo: setup
	@$(RUN) tools/demo.py $(ARGS)

comfyui: setup
	@$(RUN) tools/serve.py $(ARGS)

$(LINT)/installed: requirements-lint.txt
	$(PYTHON) -m venv $(LINT)
	$(LINT_RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements-lint.txt
	touch $@

lint: $(LINT)/installed
	$(LINT_RUN) -m ruff format --check .
	$(LINT_RUN) -m ruff check .

format: $(LINT)/installed
	$(LINT_RUN) -m ruff format .
	$(LINT_RUN) -m ruff check --fix .

# pyright takes the libraries' types from the environment that --pythonpath names.
types: $(LINT)/installed
	$(LINT_RUN) -m pyright --pythonpath $(LINT_RUN)

types-torch: $(LINT)/installed setup
	$(LINT_RUN) -m pyright --pythonpath $(RUN)

types-web:
	npx --yes --package typescript@5.9.3 tsc --project tsconfig.json

docs: setup
	$(RUN) tools/settings_reference.py
	$(RUN) tools/structure.py

templates: setup
	$(RUN) tools/templates.py

locales: setup
	$(RUN) tools/locales.py

clean:
	rm -rf .demo .pytest_cache .ruff_cache
