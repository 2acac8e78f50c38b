# Needs Python >= 3.11 and a C++17 compiler (GCC >= 12 or Clang); everything else is installed into .venv.
PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt
SOURCES := $(shell find csrc sparseflow_kernels -type f \( -name '*.py' -o -name '*.h' -o -name '*.cpp' \)) \
           setup.py pyproject.toml CMakeLists.txt constraints.txt
PYTEST_ARGS ?=

# One thread per process: tests run in parallel processes, and timings are quoted per core.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1

.PHONY: demo test native-test bench sanitize clean

demo: $(VENV)/.demo
	$(BIN)/sparseflow demo

test: $(VENV)/.test native-test
	$(BIN)/pytest -n $(JOBS) $(PYTEST_ARGS)

bench: $(VENV)/.bench
	$(BIN)/sparseflow bench --peers all
	$(BIN)/sparseflow bench --train --peers torchdiffeq-direct,diffrax
	$(BIN)/pytest bench --benchmark-only

native-test: build/native/sparseflow_native_test
	$<

sanitize: build/sanitize/sparseflow_native_test
	$<

build/native/sparseflow_native_test: CMAKE_ARGS :=
build/sanitize/sparseflow_native_test: CMAKE_ARGS := -DSPARSEFLOW_SANITIZE=ON
build/%/sparseflow_native_test: $(SOURCES) | $(VENV)/.tools
	$(BIN)/cmake --fresh -S . -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DSPARSEFLOW_PYTHON=OFF $(CMAKE_ARGS)
	$(BIN)/cmake --build build/$* --target sparseflow_native_test --parallel $(JOBS)
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tools: $(VENV)/bin/python constraints.txt
	$(PIP) cmake ninja
	touch $@

# Each set of extras is a stamp; the package itself is reinstalled when a source changed (unchanged kernels are not
# compiled again: build/ keeps their objects).
$(VENV)/.%: $(SOURCES) | $(VENV)/bin/python
	$(PIP) '.[$*]'
	touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .benchmarks sparseflow_kernels/_build.json
	find sparseflow_kernels -name '*.so' -delete
