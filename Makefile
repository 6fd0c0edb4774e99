# Two commands: `make demo` searches, `make test` checks. Both set up .venv first, both can be
# repeated. PYTHON names the interpreter to start from (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup clean

setup: .venv/ready

# One pip command for everything, so that torch and torchvision come from the same place.
.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "evosearch needs Python 3.11 or newer; make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch .venv/ready

demo: .venv/ready
	$(BIN)/evosearch launch quickstart

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

clean:
	rm -rf .venv build *.egg-info
