# make demo | make docs | make test | make nightly: each sets up .venv first, unless it is there and up to date.
PYTHON ?= python3
# What the repository is tested with, and a quick thing to install; the bounds in pyproject.toml are wider.
TORCH ?= torch==2.14.1 torchvision==0.29.1
TESTS ?=
JOBS ?= 2

BIN := .venv/bin
STAMP := .venv/installed
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help demo docs test lint nightly clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train, prune and compare a U-Net on brain slices (a few minutes)"
	@echo "make docs     the documentation as a site in build/website/site, without network"
	@echo "make test     ruff, mypy, pytest"
	@echo "make nightly  the slow tests too"

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,demo]"
	touch $@

demo: $(STAMP)
	$(BIN)/python -m lightning_prune.cli.demo

docs: $(STAMP)
	$(BIN)/python -m website

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "not slow" $(TESTS)

nightly: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) $(TESTS)

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
