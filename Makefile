# make test, make demo: each works on a fresh clone; both make .venv and install the project into it first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint docs clean

test: .venv/installed
	$(BIN)/python -m pytest -n 2

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

demo: .venv/installed
	$(BIN)/nnUNetv2_vf demo

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist site *.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
