# make test, make demo: each works on a fresh clone; both make .venv and install the project into it first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint docs package_as_installed clean

# Make glibc keep freed memory instead of returning it to the system: on 2 CPU cores the tests take a tenth less time.
test test-slow: export MALLOC_MMAP_THRESHOLD_ = 1000000000
test test-slow: export MALLOC_TRIM_THRESHOLD_ = 4000000000
test test-slow: export MALLOC_TOP_PAD_ = 100000000

test: .venv/installed
	$(BIN)/python -m pytest -n 2

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

demo: .venv/installed
	$(BIN)/nnUNetv2_vf demo

# mypy and lint-imports check the package as it is in the wheel, with trainers and planners inside it.
lint: .venv/installed package_as_installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd build/package && ../../$(BIN)/mypy --cache-dir ../../.mypy_cache
	cd build/package && PYTHONPATH=. ../../$(BIN)/lint-imports --no-cache

docs: .venv/installed package_as_installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package_as_installed:
	rm -rf build/package && mkdir -p build/package
	cp -r nnunetv2_vf pyproject.toml build/package
	cp -r trainers planners build/package/nnunetv2_vf

clean:
	rm -rf .venv build dist site *.egg-info

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
