# make demo    set everything up and run the main job on real data
# make test    set everything up and pass the tests
# make bench   the CPU benchmark (or the GPU one where there is a GPU)
# make gpu     on a machine with an NVIDIA GPU: build, GPU tests, GPU benchmark; results under benchmarks/results/
# make lint    ruff, clang-format, mypy;   make format rewrites
#
# PYTHON=python3.12 make … picks another interpreter. If it has torch, it is used as it is and torch is never
# replaced; otherwise .venv is made with the versions of requirements-dev.txt.

PYTHON ?= python3
HAS_TORCH := $(shell $(PYTHON) -c "import importlib.util as u; print(int(u.find_spec('torch') is not None))")
PY := $(if $(filter 1,$(HAS_TORCH)),$(PYTHON),.venv/bin/python)

export PATH := $(CURDIR)/.venv/bin:$(PATH)
CLANG_FORMAT := $(PY) -c "import sys, clang_format; sys.exit(clang_format.clang_format())"
PIP := $(PY) -m pip --disable-pip-version-check
CSOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h') csrc/sources.txt
CXX_FILES := $(filter-out %.txt,$(CSOURCES))

.PHONY: demo test bench gpu lint format clean
.DELETE_ON_ERROR:

demo: .stamps/build
	$(PY) examples/demo.py

test: .stamps/build
	$(PY) -m pytest

bench: .stamps/build
	$(PY) -m randfuse.bench run

gpu: .stamps/build-only
	$(PY) -m pytest -m gpu
	$(PY) benchmarks/gpu.py

lint: .stamps/build
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: .stamps/build
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

.venv/bin/python: requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip --disable-pip-version-check install --progress-bar off -r requirements-dev.txt
	touch $@

# The torch in use must be the one the extension is built with: no build isolation.
.stamps/build: $(CSOURCES) setup.py pyproject.toml $(if $(filter 1,$(HAS_TORCH)),,.venv/bin/python)
	mkdir -p .stamps
	$(PIP) install -q "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(PIP) install -q --no-build-isolation -e ".[test,demo,lint]"
	touch $@

# Without network access: whatever the Python in use has must do.
.stamps/build-only: $(CSOURCES) setup.py pyproject.toml
	mkdir -p .stamps
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .stamps build dist .venv
