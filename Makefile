# What people type here. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The extra index that serves CPU builds of torch, where one is wanted: TORCH_INDEX=https://... make setup
TORCH_INDEX ?=
DEMO_SOURCE ?= digits
# Of `make gpu`: where the results go, the folder of benchmarks/gpu_wheels.sh, a checkout of the public REPA code.
OUT ?= gpu-$(shell date +%Y%m%d-%H%M%S)
WHEELS ?=
PUBLIC ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench gpu docs clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

setup: $(VENV)/.ready  ## a virtual environment with everything (PYTHON=python3.12 chooses the interpreter)

$(VENV)/.ready: pyproject.toml constraints.txt launchers/local/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX) launchers/local/setup.sh
	touch $@

demo: setup  ## the main job on real data: two runs, samples, a comparison, an export (DEMO_SOURCE=folder/of/images)
	PATH=$(abspath $(BIN)):$$PATH launchers/local/demo.sh $(DEMO_SOURCE)

test: setup  ## the tests, but for those that take minutes each (pytest -m long)
	$(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

lint: setup  ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: setup  ## every benchmark that runs without a GPU; rows go to benchmarks/results
	for script in rng loader data step_overhead zero_memory kernels durability "evaluate sampling" evaluate_metrics \
	    evaluate_compare "export --model SiT-B/2" serve; do $(BIN)/python -m benchmarks.$$script || exit 1; done

gpu:  ## under 10 minutes on a GPU: are the kernels right, how fast is a step (WHEELS=folder on a bare machine; docs/gpu.md)
	PYTHON=$(if $(wildcard $(BIN)/python),$(abspath $(BIN)/python),$(PYTHON)) \
	    benchmarks/gpu.sh --seconds 560 --out $(OUT) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(PUBLIC),--public $(PUBLIC))

docs: setup  ## checks that every command and key in the docs is true
	$(BIN)/python -m pytest tests/test_docs.py

clean:  ## removes what the other targets made, but not runs/
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache
