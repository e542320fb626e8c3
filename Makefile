# Everything starts here; `make help` lists the targets. Nothing needs to be done by hand before.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard cython_ext/*.pyx cython_ext/*.pxd cython_ext/*.hpp) $(shell find proto -name '*.proto')

.PHONY: help install demo test test-all test-vllm check lint types soak bench clean
help:                ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

install: $(STAMP)    ## create .venv, install and compile (also done by every other target)
$(STAMP): $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== installing into $(VENV) (first time: about a minute)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools Cython numpy grpcio-tools
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,plot]'
	@touch $@

demo: install        ## three simulated engines, a daemon and a router: see requests routed to their prefix
	@$(BIN)/kvindex demo

test: install        ## the tests that need no root and no download
	@$(BIN)/python -m pytest -q -m 'not vllm and not soak'

test-vllm: install   ## the same truth against a real vLLM on CPU (builds its own environment once, 2.5 GB)
	@$(BIN)/python scripts/vllm_env.py
	@KVINDEX_REQUIRE=1 $(BIN)/python -m pytest -q -m vllm

test-all:            ## everything CI runs: tests, lint, types, real vLLM; a skip of what can run here is a failure
	@KVINDEX_REQUIRE=1 $(MAKE) test
	@$(MAKE) check
	@$(MAKE) test-vllm

check: lint types    ## ruff, mypy --strict
lint: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
types: install
	@$(BIN)/mypy

soak: install        ## long chaos and fuzz runs
	@$(BIN)/python -m pytest -q -m soak

bench: install       ## the indexes beside a Python dict, JSON lines with ratios
	@$(BIN)/python benchmarks/index_lookup.py

clean:               ## remove what the build made
	rm -rf $(VENV) build *.egg-info cython_ext/*.so kvindex/service/pb
