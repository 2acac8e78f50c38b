#!/usr/bin/env bash
# A machine with a GPU for a few minutes: builds the package, runs the GPU tests, measures. Offline: nothing is
# downloaded and nothing installed; what is missing is named. Safe to call again: objects are kept, results gone on with.
#
#     bench/gpu_run.sh build+cuda     compile in place, then the tests of the CUDA engines
#     bench/gpu_run.sh bench          bench/gpu.py, within the time that is left
#     bench/gpu_run.sh rest           tests of the Triton engines, compute-sanitizer, a profile
#
# Parts are joined by + or given one after the other. Each is run whatever became of those before it; the exit code is 0
# only if all went well. Environment:
#
#     PYTHON                 the interpreter that has torch (default: python3)
#     GPU_RUN_SECONDS        of one call (default: 570); whatever still runs then is ended
#     GPU_RUN_LOGS           folder for a log of every part and copies of the results (default: build/gpu)
#     SPARSEFLOW_CUDA_ARCHS  default 90
#     SPARSEFLOW_COMMIT      what results say they were measured at, where there is no .git
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly seconds=${GPU_RUN_SECONDS:-570}
readonly logs=${GPU_RUN_LOGS:-build/gpu}
readonly python=${PYTHON:-python3}
readonly begin=$SECONDS
readonly package='torch numpy torchdiffeq safetensors platformdirs sparseflow_kernels'  # and what it needs
export SPARSEFLOW_CUDA=on SPARSEFLOW_CUDA_ARCHS=${SPARSEFLOW_CUDA_ARCHS:-90}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONUNBUFFERED=1
mkdir -p "$logs"
failed=()

left() { echo $((seconds - (SECONDS - begin))); }

# run NAME AT_MOST COMMAND...: its output is shown and kept; at most so many seconds, and no more than are left.
run() {
  local name=$1 limit=$2 before=$SECONDS code
  shift 2
  (($(left) < limit)) && limit=$(left)
  if ((limit < 5)); then
    echo "== $name: not begun, no time is left"
    failed+=("$name: not begun")
    return 1
  fi
  echo "== $name, at most $limit s: $*"
  # a term first, so that what it started ends with it; a kill for what does not listen
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$logs/$name.log"
  code=${PIPESTATUS[0]}
  echo "== $name: exit code $code after $((SECONDS - before)) s"
  ((code == 0)) || failed+=("$name: exit code $code$( ((code == 124 || code == 137)) && echo ', out of time')")
  return "$code"
}

# The modules built here come before an installed package.
use_this_tree() {
  if compgen -G 'sparseflow_kernels/_cuda*.so' >/dev/null; then export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}; fi
}

# The first line names what this part cannot do without.
needs() {
  "$python" -P - "$@" <<'PYTHON'
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} has no {', no '.join(missing)}: install it there (sparseflow_kernels: the part build), "
             "or name another interpreter in PYTHON")
PYTHON
}

part_build() {
  needs torch numpy setuptools pybind11 || { failed+=("build: a package is missing"); return 1; }
  local tool
  for tool in cmake ninja; do
    if [[ ! -x $(dirname "$(command -v "$python")")/$tool ]] && ! command -v $tool >/dev/null; then
      echo "$tool was found neither beside $python nor on PATH"
      failed+=("build: $tool is missing")
      return 1
    fi
  done
  MAX_JOBS=${MAX_JOBS:-$(nproc)} run build 400 "$python" setup.py build_ext --inplace
}

tests() {  # NAME AT_MOST FILES...
  local name=$1 limit=$2 workers=()
  shift 2
  needs $package pytest || { failed+=("$name: a package is missing"); return 1; }
  needs xdist 2>/dev/null && workers=(-n 12)
  # not the first failure only: what else fails is worth the seconds
  run "$name" "$limit" "$python" -P -m pytest -q --durations=10 "${workers[@]}" "$@"
}

part_cuda() {
  tests cuda 400 tests/test_cuda_engine.py tests/test_cuda_streams.py tests/test_cuda_solve.py \
    tests/test_cuda_gradients.py tests/test_cuda_graph.py
}

# Results go where they are committed from; copies lie beside the logs.
bench() {  # NAME AT_MOST ARGUMENTS...
  local name=$1 limit=$2 code
  shift 2
  needs $package typer rich || { failed+=("$name: a package is missing"); return 1; }
  run "$name" "$limit" "$python" bench/gpu.py "$@"
  code=$?
  cp bench/results/*.json bench/results/*.md bench/results/*.png "$logs" 2>/dev/null
  return $code
}

# Its own budget ends before the time does: tables are written at the end.
part_bench() {
  local minutes
  minutes=$(awk -v s="$(left)" 'BEGIN { m = (s - 25) / 60; print (m > 8 ? 8 : m < 0.1 ? 0.1 : m) }')
  bench bench 570 --resume --minutes "$minutes"
}

profile() {
  command -v ncu >/dev/null || { echo "== profile: ncu was not found, so there is none"; return 0; }
  run profile 120 ncu --target-processes all --clock-control none \
    --section SpeedOfLight --section WarpStateStats --section LaunchStats \
    --kernel-name 'regex:solve_kernel|adjoint_kernel' --launch-count 4 "$python" bench/gpu_sanitized_case.py cuda
}

part_rest() {
  tests triton 240 tests/test_triton_elementwise.py tests/test_triton_engine.py tests/test_triton_gradients.py \
    tests/test_triton_graph.py tests/test_triton_matrix.py tests/test_triton_solve.py
  bench sanitize 220 --resume --only sanitize --sanitize --minutes 3
  profile
}

(($# > 0)) || { sed -n '2,17s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
for part in ${*//+/ }; do
  case $part in
    build | cuda | bench | rest) use_this_tree; "part_$part" ;;
    *) echo "bench/gpu_run.sh: there are build, cuda, bench and rest, no $part"; exit 2 ;;
  esac
done
if ((${#failed[@]} > 0)); then
  printf '== failed: %s\n' "${failed[@]}"
  exit 1
fi
