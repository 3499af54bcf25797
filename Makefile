# Everything a user or a checker runs by hand. "make" alone lists the goals.
#
#   make test            set-up, lint and all tests
#   make demo DATA=DIR   the guided run on a COCO-format data set; without DATA on generated images
#
# The variables of tools/setup_env.sh (PYTHON, VENV, MEGDET_MPI, HOROVOD_BUILD, ...) work here too.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV ?= $(CURDIR)/.venv
DATA ?=
PYTEST_ARGS ?=
GPU_CHECK_ARGS ?=
export VENV

# A second make inside a recipe would hand its job server to compilers and test runs.
unexport MAKEFLAGS

in_env = source tools/activate.sh;

.PHONY: help setup demo test lint unit gpu-check docs clean

help: ## list the goals
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s  %s\n", $$1, $$2}' Makefile

setup: ## make or complete the environment in .venv (10 min the first time, a second when up to date)
	@tools/setup_env.sh

demo: setup ## run the demonstration; DATA=folder of a COCO-format data set
	@$(in_env) tools/demo.sh $(if $(DATA),"$(DATA)")

# First the tests that need one core each, in two processes. Then those that start ranks or watch the time: one process for
# tests/parallel, and one for the rest, a test at a time in each. tests/conftest.py says which is which.
# PYTEST_ARGS=-n0 runs them in one.
test: setup lint ## set-up, lint, types, shell scripts and all tests
	@$(in_env) together=0 alone=0; \
	python -m pytest -n 2 --dist loadfile --durations 10 -m "not alone" $(PYTEST_ARGS) || together=$$?; \
	python -m pytest -n 2 --dist loadgroup --durations 10 -m alone $(PYTEST_ARGS) || alone=$$?; \
	(( (together == 0 || together == 5) && (alone == 0 || alone == 5) && together + alone < 10 ))  # 5: no test chosen

lint: setup ## ruff, mypy and shellcheck
	@$(in_env) ruff check .
	@$(in_env) mypy megdet_hpc data_prep
	@$(in_env) shellcheck -x data_prep/*.sh jobs/*.sh jobs/*.pbs tools/*.sh .ci/run

unit: setup ## the tests that start no ranks
	@$(in_env) python -m pytest tests/unit -m "not parallel" $(PYTEST_ARGS)

# No set-up and no network: the Python of .venv if there is one, else python3 with the machine's own PyTorch.
gpu-check: ## measure a machine with one GPU in 9 minutes; GPU_CHECK_ARGS="--device cpu" tries the program
	@python=python3; [[ ! -x "$(VENV)/bin/python" ]] || python="$(VENV)/bin/python"; \
	"$$python" tools/gpu_check.py $(GPU_CHECK_ARGS)

docs: setup ## the pages of docs/ as a site in build/docs; a link that leads nowhere is an error
	@$(in_env) sphinx-build --quiet --fail-on-warning --keep-going --jobs auto docs build/docs
	@echo "docs: build/docs/index.html"

clean: ## remove what make built: the environment and the tools' caches; never results, data or built wheels
	@if [[ -e "$(VENV)" && ! -f "$(VENV)/pyvenv.cfg" ]]; then \
		echo "make clean: $(VENV) is no virtual environment, left alone" >&2; \
	else rm -rf "$(VENV)"; fi
	rm -rf .pytest_cache .mypy_cache .ruff_cache build dist megdet_hpc.egg-info
	find megdet_hpc data_prep tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
