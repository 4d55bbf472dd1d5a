# One interpreter is needed: Python 3.11 or 3.12. Everything else goes into .venv.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: smoke test slow check chaos

smoke: .venv/ready
	$(BIN)/python -m ray_jobs.smoke

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The long ones, which `test` leaves out: whole runs that are killed, stopped and resized.
slow: .venv/ready
	$(BIN)/python -m pytest -m slow

# About an hour on two cores: processes of a run are killed 200 times; it must end as if none was.
chaos: .venv/ready
	$(BIN)/python -m benchmarks.chaos --out benchmarks/results/$$(date +%F)-chaos.json

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyrefly check

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
