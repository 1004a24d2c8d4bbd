# SPDX-License-Identifier: Apache-2.0
# `make env` makes what is missing, and every other target asks for it first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

ENV := .env
VENV := $(ENV)/one
PYTHON := $(VENV)/bin/python
# The lock file is for this Python; PYTHON_BASE=/path/to/python3.11 overrides the search.
PYTHON_BASE ?= $(shell command -v python3.11 || command -v python3)
PIP := $(PYTHON) -m pip --disable-pip-version-check
# The newest supported vLLM is tested from its unpacked wheel: PYTHONPATH=$(VLLM_NEXT) shadows the installed one.
VLLM_NEXT_VERSION := 0.33.0
VLLM_NEXT := $(ENV)/vllm-$(VLLM_NEXT_VERSION)
# The oldest supported SGLang likewise.
SGLANG_PREV_VERSION := 0.5.22
SGLANG_PREV := $(ENV)/sglang-$(SGLANG_PREV_VERSION)

.PHONY: help
help: ## Show the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 26

.PHONY: env
env: $(VENV)/.installed $(VLLM_NEXT)/.unpacked $(SGLANG_PREV)/.unpacked ## Create or complete the development environment

# torch first: pip takes the CPU build where one is on offer. Where only CUDA builds are, add
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu to the environment.
$(VENV)/.locked: requirements/lock.txt
	@echo "env: installing $(VENV) from $<"
	$(PYTHON_BASE) -m venv --clear $(VENV)
	$(PIP) install -q --no-deps "$$(grep '^torch==' $<)" 2> >(grep -v ' is ignored: ' >&2)
	$(PIP) install -q --no-deps -r $< 2> >(grep -v ' is ignored: ' >&2)
	@$(PYTHON) -c 'import torch' || { echo "env: this torch does not load; install its CPU build, see the comment above" >&2; exit 1; }
	@touch $@

$(VENV)/.stubbed: $(VENV)/.locked $(wildcard requirements/torchvision_stub/*.toml requirements/torchvision_stub/*/*.py)
	$(PIP) install -q --no-deps --no-build-isolation --force-reinstall ./requirements/torchvision_stub 2> >(grep -v ' is ignored: ' >&2)
	@touch $@

$(VENV)/.installed: $(VENV)/.stubbed pyproject.toml
	$(PIP) install -q --no-deps --no-build-isolation -e . 2> >(grep -v ' is ignored: ' >&2)
	@touch $@

# $(call unpack,PACKAGE,VERSION,FOLDER). Compiled libraries are left out: nothing loads them without a GPU, and they are
# nine tenths of the wheel.
define unpack
	@if [ ! -e $(3)/.unpacked ]; then set -e; echo "env: unpacking $(1) $(2)"; rm -rf $(3) $(3).part; \
	  $(PIP) download -q --no-deps --only-binary :all: -d $(3).part $(1)==$(2) 2> >(grep -v ' is ignored: ' >&2); \
	  $(PYTHON) requirements/unpack_wheel.py $(3).part/*.whl $(3); rm -rf $(3).part; fi
	@touch $(3)/.unpacked
endef
$(VLLM_NEXT)/.unpacked: $(VENV)/.locked
	$(call unpack,vllm,$(VLLM_NEXT_VERSION),$(VLLM_NEXT))
$(SGLANG_PREV)/.unpacked: $(VENV)/.locked
	$(call unpack,sglang,$(SGLANG_PREV_VERSION),$(SGLANG_PREV))

.PHONY: python-vllm python-sglang
python-vllm: $(VENV)/.installed ## Print the interpreter that has vLLM and dsv4
	@echo "$(CURDIR)/$(PYTHON)"
python-sglang: $(VENV)/.installed ## Print the interpreter that has SGLang and dsv4
	@echo "$(CURDIR)/$(PYTHON)"

.PHONY: lint format types imports test long schedules fuzz soak recipes demo clean
lint: $(VENV)/.installed ## ruff: rules and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
format: $(VENV)/.installed ## ruff: repair what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
types: $(VENV)/.installed ## mypy
	$(PYTHON) -m mypy
imports: $(VENV)/.installed ## import rules
	$(VENV)/bin/lint-imports
test: env ## All tests
	$(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
long: env ## The tests that `make test` leaves out: more versions, settings and engines, about 40 minutes
	$(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --long -m long
schedules: env ## 200 random schedules per KV mapping through the real engine (CI runs 15)
	$(PYTHON) -m pytest -q -s tests/e2e/test_vllm_schedules.py --schedules 200
fuzz: $(VENV)/.installed ## 10,000 bad configs, headers, indices, recipes and command lines each (CI asks 150)
	$(PYTHON) -m tests.support.fuzz --cases 10000
soak: $(VENV)/.installed ## An hour of random traffic against each engine's server, on pools that are too small
	$(PYTHON) -m tests.support.soak --minutes 60
recipes: env ## Check every recipe against every supported engine version
	$(VENV)/bin/dsv4 recipes check
demo: $(VENV)/.installed ## Tiny checkpoint, real `vllm serve`, one chat question, proof of who answered
	$(PYTHON) examples/demo_vllm.py
.PHONY: demo-sglang
demo-sglang: $(VENV)/.installed ## The same through the real `sglang serve`
	$(PYTHON) examples/demo_sglang.py
.PHONY: kernels
KERNEL_ARGS ?=
kernels: $(VENV)/.installed ## Compile every kernel for every GPU, bound registers and memory (KERNEL_ARGS=)
	$(PYTHON) benchmarks/compile_kernels.py --jobs 2 $(KERNEL_ARGS)
# Neither the environment nor a network: the Python that has the machine's CUDA build of torch.
GPU_PYTHON ?= python3
GPU_ARGS ?=
.PHONY: gpu
gpu: ## On a GPU: check every kernel, its graphs, its speed and the engines, under 10 minutes (GPU_PYTHON=, GPU_ARGS=)
	$(GPU_PYTHON) benchmarks/gpu.py $(GPU_ARGS)
clean: ## Remove the environment and every cache
	rm -rf $(ENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
