# Needs Python >= 3.11 and a C++17 compiler (GCC >= 12 or Clang); everything else is installed into .venv.
# nvcc, where it is found, adds the CUDA module (SPARSEFLOW_CUDA=auto|on|off, see setup.py).
PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt
SOURCES := $(shell find sparseflow_kernels -type f -name '*.py') $(NATIVE_SOURCES) setup.py pyproject.toml constraints.txt
PYTEST_ARGS ?=
TESTS = native_tests

# One thread per process: tests run in parallel processes, and timings are quoted per core.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1

.PHONY: demo test lint docs native-test bench gpu sanitize tsan fuzz wheel matrix arm clean

demo: $(VENV)/.demo
	$(BIN)/sparseflow demo

test: export SPARSEFLOW_CUDA_HOST = $(CURDIR)/build/native/_cuda_host.so
test: $(VENV)/.test native-test
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# Style and types, as pyproject.toml says.
lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, in docs/_build/html: warnings are errors; examples are tested and notebooks run. Needs no network.
docs: $(VENV)/.docs
	$(BIN)/python docs/build.py

bench: $(VENV)/.bench
	$(BIN)/sparseflow bench --peers all
	$(BIN)/sparseflow bench --train --peers torchdiffeq-direct,diffrax
	$(BIN)/pytest bench --benchmark-only

# The GPU's tests and measurements. Where PYTHON already has a torch for the GPU, bench/gpu_run.sh by itself takes that
# one: it downloads and installs nothing.
gpu: export SPARSEFLOW_CUDA = on
gpu: $(VENV)/.gpu
	PYTHON=$(BIN)/python GPU_RUN_SECONDS=1700 bench/gpu_run.sh cuda bench rest

native-test: build/native/.built
	$(BIN)/ctest --test-dir $$(cat build/native/.built) --output-on-failure --no-tests=error --parallel $(JOBS)

sanitize: build/sanitize/.built
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure --no-tests=error --parallel $(JOBS)

# The thread pool and what is shared by means of it, under the thread sanitizer; the portable kernels suffice.
tsan: build/tsan/.built
	$(BIN)/ctest --test-dir build/tsan --output-on-failure --no-tests=error -R thread_test

# Mutated programs, FUZZ of them, and a fiftieth as many modules, from another seed every day (or SEED=number, which a
# failure names).
FUZZ ?= 200000
SEED ?= $(shell date +%Y%m%d)
fuzz: build/sanitize/.built $(VENV)/.test
	build/sanitize/sparseflow_fuzz_test $(FUZZ) $(SEED)
	SPARSEFLOW_FUZZ=$$(($(FUZZ) / 50)) SPARSEFLOW_FUZZ_SEED=$(SEED) $(BIN)/pytest -n $(JOBS) tests/test_fuzz.py

# A CPU wheel that runs with glibc 2.28 and newer, in dist/, checked by auditwheel; for this machine, or ARCH=aarch64.
ARCH ?=
wheel: $(VENV)/.tools
	$(PIP) build ziglang auditwheel
	$(BIN)/python tools/wheel.py $(if $(ARCH),--arch $(ARCH))

# The quick tests with that wheel on the oldest torch, the one of constraints.txt and the newest, each in a venv of its own.
matrix: wheel
	JOBS=$(JOBS) $(PYTHON) tools/matrix.py

# The NEON kernels: compiled for aarch64 and tested under qemu's emulation. The compiler is zig's, which links all of the C
# and C++ libraries in, so that the emulator needs no aarch64 system; ARM_CXX names another one.
ARM_CXX ?=
ARM_RUN ?= $(shell command -v qemu-aarch64-static || command -v qemu-aarch64)
arm: $(VENV)/.tools
	@test -z "$(ARM_CXX)" || command -v $(firstword $(ARM_CXX)) >/dev/null || { \
	  echo "make arm: ARM_CXX=$(ARM_CXX) was not found (apt install g++-aarch64-linux-gnu, or leave ARM_CXX out)" >&2; exit 1; }
	$(if $(ARM_CXX),,$(PIP) ziglang)
	cxx="$(or $(ARM_CXX),$$($(BIN)/python tools/zig.py aarch64-linux-musl build/arm -static))" && \
	$(BIN)/cmake -S . -B build/arm -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DSPARSEFLOW_PYTHON=OFF \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$$cxx" \
	  -DCMAKE_CROSSCOMPILING_EMULATOR="$(ARM_RUN)$(if $(ARM_CXX),;-L;/usr/aarch64-linux-gnu)"
	$(BIN)/cmake --build build/arm --target cpu_tests --parallel $(JOBS)
	@test -n "$(ARM_RUN)" || { echo "make arm: the NEON kernels and their tests are compiled, and were not run: no \
	qemu-aarch64 was found (apt install qemu-user-static, or name an emulator by ARM_RUN)" >&2; exit 1; }
	$(BIN)/ctest --test-dir build/arm -L cpu --output-on-failure --no-tests=error

# The native tests lie in the tree of the installed package, so that the kernels are compiled once. Whether it has nvcc's
# part, too, is what it was configured for when the package was built.
INSTALLED_TREE = build/cmake.$$($(BIN)/python -c 'import sys, sysconfig; print(sysconfig.get_platform(), sys.implementation.cache_tag, sep="-")')/native
build/native/.built: $(NATIVE_SOURCES) | $(VENV)/.tools
	mkdir -p build/native
	tree=$(INSTALLED_TREE) && \
	$(BIN)/cmake -S . -B $$tree -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/build/native && \
	$(BIN)/cmake --build $$tree --target native_tests --parallel $(JOBS) && echo $$tree > $@

# Of x86's kernels those with the fewest and the most lanes: a sanitized set takes minutes to compile.
build/sanitize/.built: CMAKE_ARGS = -DSPARSEFLOW_PYTHON=OFF -DSPARSEFLOW_SANITIZE=ON \
  $(if $(filter x86_64,$(shell uname -m)),-DSPARSEFLOW_CPU_ISAS='baseline;avx512')
build/tsan/.built: CMAKE_ARGS = -DSPARSEFLOW_PYTHON=OFF -DSPARSEFLOW_SANITIZE=thread -DSPARSEFLOW_CPU_ISAS=baseline
build/tsan/.built: TESTS = sparseflow_thread_test
build/%/.built: $(NATIVE_SOURCES) | $(VENV)/.tools
	$(BIN)/cmake -S . -B build/$* -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) $(CMAKE_ARGS)
	$(BIN)/cmake --build build/$* --target $(TESTS) --parallel $(JOBS)
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.tools: $(VENV)/bin/python constraints.txt
	$(PIP) cmake ninja pybind11
	touch $@

# Each set of extras is a stamp; the package itself is reinstalled when a source changed (unchanged kernels are not
# compiled again: build/ keeps their objects).
$(VENV)/.gpu: EXTRAS = test,gpu
$(VENV)/.docs: EXTRAS = docs,demo
$(VENV)/.%: EXTRAS = $*
$(VENV)/.%: $(SOURCES) | $(VENV)/bin/python
	$(PIP) '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf build dist docs/_build *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache .benchmarks sparseflow_kernels/_build.json
	find sparseflow_kernels -name '*.so' -delete
