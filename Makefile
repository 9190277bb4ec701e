# make test, make demo: each works on a fresh clone; both make .venv and install the project into it first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

test: .venv/installed
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

demo: .venv/installed
	$(BIN)/nnUNetv2_vf demo

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv build dist *.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
