# make run and make test set everything up by themselves, in .venv.
PYTHON ?= python3
BIN := .venv/bin
FASHION_MNIST := /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: help setup run test check test-slow bench lint system-deps

help:
	@echo "make setup        .venv with all that fedwsa needs"
	@echo "make run          the main job: three strategies on non-IID data, a report at the end"
	@echo "make test         linters, types, import contracts and every test but the slow ones"
	@echo "make check        the same without the tests that start processes: some minutes"
	@echo "make test-slow    what is longer"
	@echo "make bench        speed against a bare PyTorch loop and Flower's own simulator"
	@echo "make system-deps  Debian's package with the 60,000 images of Fashion-MNIST"

setup:
	@.ci/setup $(PYTHON)

run: setup
	@$(BIN)/fedwsa run

lint: setup
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --quiet --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo > .import_linter.log 2>&1 || { cat .import_linter.log; exit 1; }

test: lint
	@$(BIN)/pytest -m "not slow" --cov --cov-report=term

check: lint
	@$(BIN)/pytest -q -m "not slow and not process"

test-slow: setup
	@$(BIN)/pytest -m slow

bench: setup
	@$(BIN)/python -m experiments.bench

system-deps:
	@test -e $(FASHION_MNIST) || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq dataset-fashion-mnist; }
