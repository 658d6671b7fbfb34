# `make selfplay` runs the main job, `make test` the tests; each does its own set-up and a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/countdown3
SEED ?= 0
FAULTS ?= 200
HOURS ?= 2

.PHONY: selfplay test test-slow test-long lint types check bench bench-peers bench-objectives chaos soak clean

# torch first and by itself: a CPU wheel that pip knows of then satisfies everything that comes later
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch>=2.10,<2.14"
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

# an interrupted run is continued
selfplay: $(VENV)/.installed
	if test -e $(RUN)/run.json; then $(BIN)/selfplay resume $(RUN); \
	else $(BIN)/selfplay launch configs/countdown3.yaml --run-dir $(RUN) seed=$(SEED); fi

# tests with a Ray of their own one after the other, the others on both cores
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not cluster and not bench and not gpu and not server" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m "cluster and not slow and not bench and not gpu and not server and not long"

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "slow and not cluster and not bench and not server and not long" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m "slow and cluster and not bench and not server and not long"

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: test lint types

bench: $(VENV)/.installed
	$(BIN)/python scripts/bench.py --out bench/results.json

bench-peers: $(VENV)/.installed
	$(BIN)/python scripts/bench_peers.py --run $(RUN)

# faults at random moments on a cluster of this machine: 200 of them over several runs, or one run for HOURS
chaos: $(VENV)/.installed-dev
	$(BIN)/python scripts/chaos.py --faults $(FAULTS) --every 12 --iterations 12

soak: $(VENV)/.installed-dev
	$(BIN)/python scripts/chaos.py --hours $(HOURS) --every 20 --iterations 1000

bench-objectives: $(VENV)/.installed
	$(BIN)/python scripts/bench_objectives.py

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
