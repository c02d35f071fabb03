# The verbs of the project; `make help` lists them.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ISOLATED ?=
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py csrc/native_build.py $(shell find csrc -name '*.cpp' -o -name '*.h')
BENCHMARKS ?= losses similarity_lse similarity_softplus sampled_similarity similarity_topk \
	nt_xent info_nce sup_con queue never_worse
RESULTS = benchmarks/results/$(shell $(BIN)/python benchmarks/harness.py)

# A native module that does not compile is an error here, not a reason to go on without it.
export SSLKERN_REQUIRE_NATIVE = 1
# pip compiles no Python (half of its time): what is imported is compiled then, once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup build demo test test-all test-distributed triton-test triton-offline cuda-test cuda-offline lint format sanitize bench-setup bench gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.setup  ## .venv with torch (PYTHON's, if it has one and not ISOLATED=1; else TORCH), sslkern in place, and what tests need

has_torch = $(1) -c 'import torch' 2>/dev/null
PIP = $(BIN)/python -m pip install --no-compile
INSTALL = $(PIP) --no-build-isolation -c $(VENV)/constraints.txt
SAY = @printf '\n== %s\n'

# The constraint keeps every later install from replacing torch.
$(VENV)/constraints.txt:
	$(SAY) '$(VENV), 1 of 3: PyTorch, NumPy and what compiles the kernels. PyTorch for CPUs is 200 MB, with CUDA some GB.'
	test -x $(BIN)/python || $(PYTHON) -m venv \
		$(if $(ISOLATED),,$$($(call has_torch,$(PYTHON)) && echo --system-site-packages)) $(VENV)
	$(PIP) $$($(call has_torch,$(BIN)/python) || echo '$(TORCH)') numpy 'setuptools>=77' 'pybind11>=2.13' ninja
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__)' > $@.tmp && mv $@.tmp $@

$(VENV)/.setup: $(VENV)/constraints.txt pyproject.toml $(NATIVE)
	$(SAY) '$(VENV), 2 of 3: compiling csrc/, minutes of work for one core.'
	$(BIN)/python setup.py -q build_ext --inplace
	$(SAY) '$(VENV), 3 of 3: what the trainers and the tests need, 110 MB.'
	$(INSTALL) -e '.[train,test]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.setup
	$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/.setup
	$(INSTALL) -e '.[bench]'
	@touch $@

build:  ## recompile what changed in csrc/, quicker than setup
	@test -e $(VENV)/.setup || $(MAKE) setup
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $(VENV)/.setup

demo: setup  ## train SimCLR on MNIST-5k, print the accuracies and where the report is; DEMO='--epochs 1' is short
	$(BIN)/ssltrain simclr --overwrite $(DEMO)

# As many processes as cores, up to eight, of one thread each.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test: setup  ## the tests, without the slow and the long ones
	$(PYTEST) $(if $(MARKED),-m '$(MARKED)')

test-all: setup  ## all tests, also those of the kernels of a GPU
	$(PYTEST) -m ''
	$(MAKE) triton-test cuda-test

test-distributed: setup  ## the tests of losses over many processes, with all combinations of their choices
	$(PYTEST) -m '' tests/distributed

# Triton beside torch's packages, not among them: the version of torch 2.11, and the newest.
$(VENV)/triton-%: | $(VENV)/.setup
	$(INSTALL) --no-deps --target $@.tmp triton$(if $(filter newest,$*),,==$*) && mv $@.tmp $@

INTERPRETED = tests/ops tests/gpu/test_triton_paths.py \
	tests/functional/test_nt_xent.py tests/functional/test_info_nce.py tests/functional/test_siglip.py

# On the newest, which differs in what it accepts, the primitive that has most of the code.
triton-interpret-newest: INTERPRETED := tests/ops/test_similarity_lse.py tests/functional/test_nt_xent.py

triton-interpret-%: $(VENV)/triton-%
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$< $(BIN)/python -m pytest -n 2 --dist worksteal \
		-m 'not slow$(if $(MARKED), and $(MARKED))' $(INTERPRETED)

triton-test:  ## the Triton kernels without a GPU: their values in the interpreter, their code for three architectures
	$(MAKE) triton-interpret-3.6.0
	$(MAKE) triton-interpret-newest
	PYTHONPATH=$(CURDIR)/$(VENV)/triton-3.6.0 $(BIN)/python -m pytest -m '$(MARKED)' tests/gpu/test_triton_offline.py

# CUDA's compiler as a library, 60 MB, as every CUDA build of torch has it.
$(VENV)/nvrtc: | $(VENV)/.setup
	$(INSTALL) --no-deps --target $@.tmp nvidia-cuda-nvrtc && mv $@.tmp $@

# cuobjdump comes with Triton.
OFFLINE = PYTHONPATH=$(CURDIR)/$(VENV)/triton-3.6.0:$(CURDIR)/$(VENV)/nvrtc $(BIN)/python

cuda-test: $(VENV)/triton-3.6.0 $(VENV)/nvrtc  ## the CUDA kernels without a GPU or nvcc: how they compile, their code for three architectures
	$(OFFLINE) -m pytest -n 2 --dist loadfile -m '$(MARKED)' tests/test_cuda_kernels.py tests/gpu/test_cuda_resources.py tests/gpu/test_hopper_resources.py

triton-offline: $(VENV)/triton-3.6.0  ## compile all Triton kernels, into benchmarks/results/offline
	PYTHONPATH=$(CURDIR)/$< $(BIN)/python tests/gpu/offline.py --all

cuda-offline: $(VENV)/triton-3.6.0 $(VENV)/nvrtc  ## compile all CUDA kernels, into benchmarks/results/offline
	$(OFFLINE) -m tests.gpu.test_cuda_resources
	$(OFFLINE) -m tests.gpu.test_hopper_resources

lint: $(VENV)/.dev  ## ruff, mypy and clang-format, nothing is changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev  ## what lint asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files -co --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

sanitize: $(VENV)/constraints.txt  ## the C++ tests under Address-, UndefinedBehavior- and ThreadSanitizer
	$(BIN)/python csrc/native_build.py address,undefined $(BRIEF)
	$(BIN)/python csrc/native_build.py thread $(BRIEF)

bench-setup: $(VENV)/.bench  ## the packages that the benchmarks compare with

bench: bench-setup  ## all benchmarks: JSON, tables and plots into benchmarks/results/<cpu>
	for name in $(BENCHMARKS); do \
		$(BIN)/python -m pytest benchmarks/bench_$$name.py --benchmark-json=$(RESULTS)/$$name.json || exit 1; \
	done
	$(BIN)/python benchmarks/plots.py $(RESULTS)

# Not in .venv: a machine with a GPU may have no network, and its own torch is the one to use.
gpu:  ## on a machine with a GPU: tests, timings, sanitizers and a training run, into OUT; WHEELS as in gpu.sh
	PYTHON=$(PYTHON) benchmarks/gpu.sh $(or $(OUT),benchmarks/results/gpu) $(WHEELS)

clean:  ## remove what was built, keep .venv
	rm -rf build *.egg-info sslkern/_cpu*.so
