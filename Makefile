# make test: everything CI runs.  make demo: tune and measure one Qwen3-30B-A3B layer on this machine.
# Both make the virtual environment they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.moestro-installed

.PHONY: test lint demo clean

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/moestro/kernels/cpu/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,hf,report,dev]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

demo: $(STAMP)
	$(BIN)/moestro tune --model qwen3-30b-a3b --format nvfp4 --device cpu --tokens 1,16,64,256 --routing zipf --budget 45 --store demo/store
	$(BIN)/moestro bench --model qwen3-30b-a3b --format nvfp4 --format bf16 --device cpu --tokens 1,16,64,256 --routing zipf \
	  --store demo/store --json demo/bench.json --report demo/report.html

clean:
	rm -rf $(VENV) demo build
