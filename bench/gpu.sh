#!/usr/bin/env bash
# Builds, tests, sanitizes and times the CUDA kernels on this machine, without a network:
#   bash bench/gpu.sh OUT [build] [test] [sanitize] [bench]     all four, if none is named
# Where a command may take nine minutes only, two calls do everything (what is built stays):
#   bash bench/gpu.sh OUT build test
#   bash bench/gpu.sh OUT build sanitize bench
# Needs a Python with torch 2.11 or later for CUDA (PYTHON=..., default python3), pytest, nvcc.
# What is learnt goes to a few files in OUT: a log, results.json, report.html, bench.tar.gz. A step
# that fails is reported at the end, and does not keep the others from running.
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

# step NAME SECONDS COMMAND... An interrupt first, so that pytest still says what it has seen.
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
  # First what only a GPU shows.
  step pytest 340 "$python" -m pytest -q -m cuda -p no:cacheprovider --durations 5 \
    tests/test_cuda.py tests
}

# Every kernel and plan, in two types; the caching allocator would hide what lies beyond a tensor.
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

# Code for this machine's own architecture only.
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
