# Qwen Edit Trainer: one command for each thing a person wants.
#
#   make demo        train the demo LoRA inside a real ComfyUI
#   make test        the whole test suite            (make test ARGS="tests/core -k pairing")
#   make test-fast   the fast tier: no server, no browser, no training
#   make comfyui     ComfyUI's page with the pack in it, for a person
#   make lint types  formatting and style; types
#   make types-web   types of the page's scripts (needs npm)
#   make docs        writes docs/settings.md from the settings, and the drawing in docs/architecture.md
#
# COMFYUI_DIR=folder uses that ComfyUI; TORCH=requirement installs that torch (only if there is none yet).

COMFYUI_DIR ?=
TORCH ?= torch==2.13.0
PYTHON ?= python3
ARGS ?=

VENV := .venv
RUN := $(VENV)/bin/python
export COMFYUI_DIR
export TORCH

.PHONY: help setup test test-fast demo comfyui lint format types types-web docs clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -12

setup:
	@$(PYTHON) tools/setup.py

test: setup
	$(RUN) -m pytest $(ARGS)

test-fast: setup
	$(RUN) -m pytest --fast $(ARGS)

demo: setup
	@$(RUN) tools/demo.py $(ARGS)

comfyui: setup
	@$(RUN) tools/serve.py $(ARGS)

lint: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

format: setup
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

types: setup
	$(RUN) -m pyright

types-web:
	npx --yes --package typescript@5.9.3 tsc --project tsconfig.json

docs: setup
	$(RUN) tools/settings_reference.py
	$(RUN) tools/structure.py

clean:
	rm -rf .demo .pytest_cache .ruff_cache
