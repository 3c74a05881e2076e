#!/usr/bin/env bash
# Builds, tests, sanitizes and times the CUDA kernels on this machine, without a network:
#   bash bench/gpu.sh OUT [build] [test] [sanitize] [bench]
# By default all four, but for the build where a library with CUDA kernels loads already. Tests and
# sanitizers run side by side, then the benchmarks alone. Where a command may take a few minutes only:
#   bash bench/gpu.sh OUT build
#   bash bench/gpu.sh OUT test sanitize
#   bash bench/gpu.sh OUT bench
# Needs a Python with torch 2.11 or later for CUDA (PYTHON=..., default python3), pytest, nvcc; with
# pytest-xdist the tests take one minute instead of five. The results go to OUT: a log of each step,
# results.json, report.html and bench.tar.gz. A step that fails is reported at the end; the other
# steps still run.
set -u
cd "$(dirname "$0")/.." || exit
out=${1:?usage: bash bench/gpu.sh OUT [build] [test] [sanitize] [bench]}
shift
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# step NAME SECONDS COMMAND... The timeout interrupts first, so that pytest still prints its summary.
step() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  echo "=== $*" > "$out/$name.log"
  timeout -s INT -k 10 "$limit" "$@" >> "$out/$name.log" 2>&1 || touch "$scratch/$name.failed"
  echo "$name: $((SECONDS - start)) s; $(tail -n 1 "$out/$name.log")"
}

build() {
  step build 400 "$python" setup.py build_ext --inplace
  step info 20 "$python" -m llmloss_ext info
}

# First the tests that need a GPU.
test_() {
  local workers=()
  if "$python" -c 'import xdist' 2> /dev/null; then
    # pytest-benchmark warns of xdist, and the tests make errors of warnings.
    workers=(-n $(($(nproc) < 12 ? $(nproc) : 12)) --dist worksteal -p no:benchmark)
  fi
  step pytest 400 env OMP_NUM_THREADS=1 "$python" -m pytest -q -m cuda -p no:cacheprovider \
    --durations 5 "${workers[@]}" tests/test_cuda.py tests
}

# Every kernel and plan, in two dtypes. The caching allocator would hide accesses out of bounds.
sanitize() {
  step "$1" 240 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$1" --error-exitcode 1 \
    "$python" -m pytest -q -m cuda -p no:cacheprovider \
    -k "not (test_every_plan and (torch.float16 or torch.float64))" \
    tests/test_cuda.py::test_every_plan tests/test_token_stats.py tests/test_inplace.py
}

bench() {
  step bench 220 "$python" -m llmloss_ext bench run --suite gpu --out "$scratch/bench" --overwrite
  [ -d "$scratch/bench" ] || return
  tar -czf "$out/bench.tar.gz" -C "$scratch" bench
  find "$scratch/bench" -maxdepth 1 \( -name results.json -o -name report.html \) \
    -exec cp {} "$out" \;
}

if (($#)); then
  phases=" $* "
else
  phases=" build test sanitize bench "
  if "$python" -m llmloss_ext info 2> /dev/null | grep -q '^CUDA kernels *built'; then
    echo "build: the library that is there loads"
    phases=${phases/build /}
  fi
fi
for phase in $phases; do
  case $phase in
    build | test | sanitize | bench) ;;
    *) echo "gpu.sh: no phase $phase"; exit 2 ;;
  esac
done
# Compile for this machine's architecture only.
LLMLOSS_CUDA_ARCHS=${LLMLOSS_CUDA_ARCHS:-$("$python" -c \
  'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
export LLMLOSS_CUDA_ARCHS MAX_JOBS=${MAX_JOBS:-$(nproc)}
nvidia-smi > "$out/nvidia-smi.log" 2>&1

[[ $phases == *" build "* ]] && build
[[ $phases == *" test "* ]] && test_ &
[[ $phases == *" sanitize "* ]] && sanitize memcheck &
[[ $phases == *" sanitize "* ]] && sanitize racecheck &
wait
[[ $phases == *" bench "* ]] && bench

shopt -s nullglob
failed=("$scratch"/*.failed)
failed=("${failed[@]##*/}")
if ((${#failed[@]})); then
  echo "failed: ${failed[*]%.failed} (see $out)"
  exit 1
fi
