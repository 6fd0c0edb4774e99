# Two commands: `make demo` searches, `make test` checks. Both set up .venv first, both can be
# repeated. `make lowest` checks with the oldest libraries. PYTHON names the interpreter to start from (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lowest setup clean

setup: .venv/ready

# One pip command for everything, so that torch and torchvision come from the same place.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "evosearch needs Python 3.11 or newer; make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch .venv/ready

demo: .venv/ready
	$(BIN)/evosearch launch quickstart

# Tests start evosearch a hundred times: compiled once, whatever the environment says of that.
test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n 2

# The tests with the lowest versions of all libraries that pyproject.toml allows.
lowest: .venv-lowest/ready
	.venv-lowest/bin/pytest -n 2

.venv-lowest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/lowest.py > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .venv-lowest/constraints.txt --editable '.[onnx]' \
		hypothesis psutil pytest pytest-timeout pytest-xdist
	touch .venv-lowest/ready

clean:
	rm -rf .venv .venv-lowest build *.egg-info
