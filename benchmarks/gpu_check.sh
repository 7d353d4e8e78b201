#!/usr/bin/env bash
# Builds, tests and benchmarks everything on a GPU machine, in one command and within eight minutes.
#
#   benchmarks/gpu_check.sh
#
# Reads:  OUT     folder for the results (default benchmarks/results)
#         PYTHON  interpreter that has PyTorch (default python3)
#         COMMIT  commit to note where there is no git repository
# Writes: $OUT/gpu_check.txt          machine, versions, commit, one line per stage
#         $OUT/gpu_check.log          everything the stages printed
#         $OUT/bn_gate_act_cuda.csv   operator benchmark
#         $OUT/search_step_cuda.csv   search step benchmark
#
# The extension is built in place for the GPUs present, or for TORCH_CUDA_ARCH_LIST. A stage that fails or runs out of time is
# recorded and the next one goes on. Exit code: 0 all passed, 1 a stage failed, 2 no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
BUDGET_S=480
mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
SUMMARY=$OUT/gpu_check.txt
LOG=$OUT/gpu_check.log
: >"$SUMMARY"
: >"$LOG"

say() { printf '%s\n' "$*" | tee -a "$SUMMARY"; }

describe_machine() {
  "$PYTHON" - <<'PY'
import platform
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable CUDA device")
gpu = torch.cuda.get_device_properties(0)
print(f"gpu       {gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors")
print(f"memory    {gpu.total_memory / 2**30:.0f} GiB")
print(f"versions  torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")
PY
}

say "date      $(date -u +%Y-%m-%dT%H:%M:%SZ)"
say "commit    $(git rev-parse --short HEAD 2>/dev/null || echo "${COMMIT:-unknown}")$(
  [ -z "$(git status --porcelain --untracked-files=no 2>/dev/null)" ] || echo ', with local changes')"
if ! machine=$(describe_machine 2>&1); then
  say "NO GPU: $machine"
  say "gpu_check needs a machine with an NVIDIA GPU and a CUDA build of PyTorch; nothing was built, tested or measured."
  exit 2
fi
say "$machine"
say "driver    $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1)"
say "nvcc      $(nvcc --version 2>/dev/null | sed -n 's/.*release \([^,]*\),.*/\1/p')"
say ""

failures=0

# stage <name> <seconds at most> <command...>. Tests of which none was selected fail too: pytest then exits with 5.
stage() {
  local name=$1 limit=$2 left=$((BUDGET_S - SECONDS)) start=$SECONDS code
  shift 2
  if [ "$left" -lt 10 ]; then
    say "$(printf '%-12s NOT RUN  no time left of %d s' "$name" "$BUDGET_S")"
    failures=$((failures + 1))
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  {
    printf '\n===== %s: %s\n' "$name" "$*"
    timeout --kill-after=5 "$limit" "$@" 2>&1
  } >>"$LOG"
  code=$?
  local verdict=passed
  case $code in
    0) ;;
    124 | 137) verdict="TIMEOUT after $limit s" ;;
    127) verdict="MISSING COMMAND" ;;
    *) verdict="FAILED with code $code" ;;
  esac
  [ "$code" -eq 0 ] || failures=$((failures + 1))
  say "$(printf '%-12s %-22s %4d s  %s' "$name" "$verdict" $((SECONDS - start)) "$(tail -n 1 "$LOG" | cut -c 1-120)")"
}

export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PFS_FAST_REQUIRE_EXT=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

stage build 200 env PFS_FAST_CUDA=1 "$PYTHON" setup.py build_ext --inplace
stage op-tests 120 "$PYTHON" -m pytest -q tests/ops -k cuda
stage gpu-tests 60 "$PYTHON" -m pytest -q tests --ignore=tests/ops -k "cuda or gpu"
stage bench-op 90 "$PYTHON" -m benchmarks.ops.bench_bn_gate_act --device cuda --dtype float32 bfloat16 \
  --out "$OUT/bn_gate_act_cuda.csv"
stage bench-step 90 "$PYTHON" -m benchmarks.bench_search_step --device cuda --out "$OUT/search_step_cuda.csv"
# Each tensor in an allocation of its own, or memcheck sees PyTorch's large blocks instead of tensors.
stage memcheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
  "$PYTHON" -m pytest -q tests/ops/test_cuda_device.py -k packs_and_single_values
stage racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 \
  "$PYTHON" -m pytest -q tests/ops/test_cuda_device.py -k "packs_and_single_values and float32"

say ""
if [ "$failures" -gt 0 ]; then
  say "$failures stage(s) did not pass in $SECONDS s; see $LOG"
  exit 1
fi
say "all stages passed in $SECONDS s; results in $OUT"
