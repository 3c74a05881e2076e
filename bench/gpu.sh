#!/usr/bin/env bash
# Builds, tests, sanitizes and times the CUDA kernels on this machine, within nine minutes and
# without a network:  bash bench/gpu.sh OUT
# Needs a Python with torch 2.11 or later for CUDA (PYTHON=..., default python3), pytest, nvcc.
# Everything that is learnt goes to OUT; a step that fails is reported at the end, and does not keep
# the others from running.
set -u
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/gpu.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=()

# step NAME SECONDS COMMAND...
step() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" > "$out/$name.log" 2>&1 || failed+=("$name")
  echo "$name: $((SECONDS - start)) s; $(tail -n 1 "$out/$name.log")"
}

# Code for this machine's own architecture only.
LLMLOSS_CUDA_ARCHS=${LLMLOSS_CUDA_ARCHS:-$("$python" -c \
  'import torch; print("%d%d" % torch.cuda.get_device_capability())')}
export LLMLOSS_CUDA_ARCHS MAX_JOBS=${MAX_JOBS:-$(nproc)}
nvidia-smi > "$out/nvidia-smi.txt" 2>&1
step build 180 "$python" setup.py build_ext --inplace
step info 60 "$python" -m llmloss_ext info
step pytest 180 "$python" -m pytest -q -m cuda -p no:cacheprovider tests
# Every kernel and plan once; the caching allocator would hide what lies beyond a tensor.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
  step "$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$python" -m pytest -q -m cuda -p no:cacheprovider tests/test_token_stats.py tests/test_inplace.py
done
unset PYTORCH_NO_CUDA_MEMORY_CACHING
step bench 200 "$python" -m bench --rounds 7 --out "$out/bench.json"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]} (see their logs in $out)"
  exit 1
fi
