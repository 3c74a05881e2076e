#!/usr/bin/env bash
# Builds, tests, sanitizes and times the CUDA kernels on this machine, without a network:
#   bash bench/gpu.sh OUT [build] [test] [sanitize] [bench]     default: all four
# If a command may take nine minutes at most, split the work (the build is kept):
#   bash bench/gpu.sh OUT build test
#   bash bench/gpu.sh OUT build sanitize bench
# Needs a Python with torch 2.11 or later for CUDA (PYTHON=..., default python3), pytest, nvcc.
# The results go to OUT: a log, results.json, report.html and bench.tar.gz. A step that fails is
# reported at the end; the other steps still run.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/gpu.sh OUT [build] [test] [sanitize] [bench]}
shift
phases=${*:-build test sanitize bench}
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/gpu-${phases// /-}.log
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()

# step NAME SECONDS COMMAND... The timeout interrupts first, so that pytest still prints its summary.
step() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout -s INT -k 10 "$limit" "$@" > "$scratch/log" 2>&1 || failed+=("$name")
  { echo "=== $name: $*"; cat "$scratch/log"; } >> "$log"
  echo "$name: $((SECONDS - start)) s; $(tail -n 1 "$scratch/log")"
}

build() {
  step build 150 "$python" setup.py build_ext --inplace
  step info 20 "$python" -m llmloss_ext info
}

test_() {
  # First the tests that need a GPU.
  step pytest 340 "$python" -m pytest -q -m cuda -p no:cacheprovider --durations 5 \
    tests/test_cuda.py tests
}

# Every kernel and plan, in two dtypes. The caching allocator would hide accesses out of bounds.
sanitize() {
  local tool
  for tool in memcheck racecheck; do
    step "$tool" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -m cuda -p no:cacheprovider \
      -k "not (test_every_plan and (torch.float16 or torch.float64))" \
      tests/test_cuda.py::test_every_plan tests/test_token_stats.py tests/test_inplace.py
  done
}

bench() {
  step bench 220 "$python" -m bench run --suite gpu --out "$scratch/bench" --overwrite
  [ -d "$scratch/bench" ] || return
  tar -czf "$out/bench.tar.gz" -C "$scratch" bench
  find "$scratch/bench" -maxdepth 1 \( -name results.json -o -name report.html \) \
    -exec cp {} "$out" \;
}

# Compile for this machine's architecture only.
LLMLOSS_CUDA_ARCHS=${LLMLOSS_CUDA_ARCHS:-$("$python" -c \
  'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
export LLMLOSS_CUDA_ARCHS MAX_JOBS=${MAX_JOBS:-$(nproc)}
nvidia-smi > "$log" 2>&1
for phase in $phases; do
  case $phase in
    build | sanitize | bench) "$phase" ;;
    test) test_ ;;
    *) echo "gpu.sh: no phase $phase"; exit 2 ;;
  esac
done
if ((${#failed[@]})); then
  echo "failed: ${failed[*]} (see $log)"
  exit 1
fi
