# The verbs of the project; `make help` lists them.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py csrc/native_build.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
BENCHMARKS ?= losses similarity_lse similarity_softplus sampled_similarity similarity_topk \
	nt_xent info_nce sup_con queue never_worse
RESULTS = benchmarks/results/$(shell $(BIN)/python benchmarks/harness.py)

# A native module that does not compile is an error here, not a reason to go on without it.
export SSLKERN_REQUIRE_NATIVE = 1

.PHONY: help setup build demo test test-all triton-test triton-offline lint format sanitize bench-setup bench gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.setup  ## .venv with torch (yours if PYTHON has one, else TORCH), sslkern in place, and what tests need

# The constraint keeps every later install from replacing torch.
$(VENV)/constraints.txt:
	test -x $(BIN)/python || $(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q '$(TORCH)'
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__)' > $@.tmp && mv $@.tmp $@

INSTALL = $(BIN)/python -m pip install -q -c $(VENV)/constraints.txt

$(VENV)/.setup: $(VENV)/constraints.txt pyproject.toml $(NATIVE)
	$(INSTALL) -e '.[train,test]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.setup
	$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/.setup
	$(INSTALL) -e '.[bench]'
	@touch $@

build:  ## recompile what changed in csrc/, quicker than setup
	@test -e $(VENV)/.dev || $(MAKE) $(VENV)/.dev
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $(VENV)/.setup

demo: setup  ## train SimCLR on MNIST-5k, print the accuracies and where the report is
	$(BIN)/ssltrain simclr --overwrite

test: setup  ## the tests, without the slow ones
	$(BIN)/python -m pytest

test-all: setup  ## all tests
	$(BIN)/python -m pytest -m ''

# Triton beside torch's packages, not among them: the version of torch 2.11, and the newest.
$(VENV)/triton-%: | $(VENV)/.setup
	$(INSTALL) --no-deps --target $@.tmp triton$(if $(filter newest,$*),,==$*) && mv $@.tmp $@

INTERPRETED = tests/ops tests/gpu/test_triton_paths.py \
	tests/functional/test_nt_xent.py tests/functional/test_info_nce.py tests/functional/test_siglip.py

triton-interpret-%: $(VENV)/triton-%
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$< $(BIN)/python -m pytest $(INTERPRETED)

triton-test:  ## the Triton kernels without a GPU: their values in the interpreter, their code for three architectures
	$(MAKE) -j2 -O triton-interpret-3.6.0 triton-interpret-newest
	PYTHONPATH=$(CURDIR)/$(VENV)/triton-3.6.0 $(BIN)/python -m pytest tests/gpu/test_triton_offline.py tests/gpu/test_cuda_resources.py

triton-offline: $(VENV)/triton-3.6.0  ## compile all Triton kernels, into benchmarks/results/offline
	PYTHONPATH=$(CURDIR)/$< $(BIN)/python tests/gpu/offline.py --all

lint: $(VENV)/.dev  ## ruff and clang-format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev  ## what lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

sanitize: $(VENV)/.dev  ## the C++ tests under Address-, UndefinedBehavior- and ThreadSanitizer
	$(BIN)/python csrc/native_build.py address,undefined
	$(BIN)/python csrc/native_build.py thread

bench-setup: $(VENV)/.bench  ## the packages that the benchmarks compare with

bench: bench-setup  ## all benchmarks: JSON, tables and plots into benchmarks/results/<cpu>
	for name in $(BENCHMARKS); do \
		$(BIN)/python -m pytest benchmarks/bench_$$name.py --benchmark-json=$(RESULTS)/$$name.json || exit 1; \
	done
	$(BIN)/python benchmarks/plots.py $(RESULTS)

# Not in .venv: a machine with a GPU may have no network, and its own torch is the one to use.
gpu:  ## on a machine with a GPU: build, tests, sanitizer, timings and a training run, into OUT; WHEELS as in gpu.sh
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(or $(OUT),benchmarks/results/gpu) $(WHEELS)

clean:  ## remove what was built, keep .venv
	rm -rf build *.egg-info sslkern/_cpu*.so sslkern/_cuda*.so
