# Everything runs in .venv, which the first target that needs it makes. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format clean

demo: .venv/ready
	$(BIN)/vmcr2 compare digits --out runs/demo

# Eight workers at most: each loads torch and keeps processes of its own for the tests of several ranks.
test: .venv/ready
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch is installed first and by itself: that way pip takes the pinned build and pulls no other.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build dist
