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

# What was built for one interpreter and torch is not taken for another.
KEY := $(shell $(PYTHON) -c "import sys, importlib.metadata as m, importlib.util as u; \
	print(sys.implementation.cache_tag, m.version('torch') if u.find_spec('torch') else 'venv', sep='-')")
BUILD := .stamps/build-$(KEY)

demo: $(BUILD)
	$(PY) examples/demo.py

test: $(BUILD)
	$(PY) -m pytest -n 2 --dist worksteal

bench: $(BUILD)
	$(PY) -m randfuse.bench run

gpu: .stamps/only-$(KEY)
	$(PY) -m pytest -m gpu
	$(PY) benchmarks/gpu.py

lint: .stamps/lint-$(KEY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: .stamps/lint-$(KEY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

.stamps/venv: requirements-dev.txt
	mkdir -p .stamps
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip --disable-pip-version-check install --progress-bar off -r requirements-dev.txt
	touch $@

# The torch in use must be the one the extension is built with (no build isolation) and stays what it is.
$(BUILD): $(CSOURCES) setup.py pyproject.toml $(if $(filter 1,$(HAS_TORCH)),,.stamps/venv)
	mkdir -p .stamps
	$(PIP) install -q "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(PIP) install -q --no-build-isolation -e ".[test,demo]" "torch==$$($(PY) -c 'import torch; print(torch.__version__)')"
	touch $@

.stamps/lint-$(KEY): $(BUILD)
	$(PIP) install -q --no-build-isolation -e ".[lint]"
	touch $@

# Without network access: whatever the Python in use has must do.
.stamps/only-$(KEY): $(CSOURCES) setup.py pyproject.toml
	$(PY) -c "import torch" || (echo "make gpu needs a Python with a CUDA build of torch: make gpu PYTHON=…"; exit 1)
	mkdir -p .stamps
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .stamps build dist .venv
