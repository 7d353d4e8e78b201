#!/usr/bin/env bash
# Builds, and then tests or measures, on a GPU machine with 16 cores; each of the two ends within eight minutes.
#
#   benchmarks/gpu_check.sh tests     operators, everything else that needs a GPU, sanitizers
#   benchmarks/gpu_check.sh bench     the benchmarks, what matters most first
#   benchmarks/gpu_check.sh MODE --list     the stages alone: name, seconds at most, command; needs no GPU
#
# Reads:  OUT     folder for the results (default benchmarks/results)
#         PYTHON  interpreter that has PyTorch (default python3)
#         COMMIT  commit to note where there is no git repository
#         wheels/ packages to use beside those installed, where there is such a folder (Torch-Pruning for the tests);
#                 nothing is downloaded
# Writes: $OUT/gpu_MODE.txt      machine, versions, commit, one line per stage with its time
#         $OUT/gpu_MODE.log      everything the stages printed
#         $OUT/<suite>_cuda.csv  one for each suite of python -m benchmarks, profile quick
#         $OUT/<suite>_cuda.md   their tables
#
# The extension is built in place for the GPUs present, or for TORCH_CUDA_ARCH_LIST. A stage that fails or runs out of time is
# recorded and the next one goes on. Exit code: 0 all passed, 1 a stage failed, 2 wrong arguments or no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

mode=${1:-} listing=${2:-}
case "$mode:$listing:$#" in
  tests::1 | bench::1 | tests:--list:2 | bench:--list:2) ;;
  *)
    echo "usage: benchmarks/gpu_check.sh tests|bench [--list]" >&2
    exit 2
    ;;
esac

OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
BUDGET_S=480

# run_stages: the stages of the mode, in order, each through `stage`.
run_stages() {
  stage build 120 env PFS_FAST_CUDA=1 "$PYTHON" setup.py build_ext --inplace
  if [ "$mode" = tests ]; then
    # The emulation needs no GPU, and minutes of compiling.
    stage op-tests 120 "$PYTHON" -m pytest -q -n 8 tests/ops -k "cuda and not emulation"
    stage gpu-tests 90 "$PYTHON" -m pytest -q -n 8 tests --ignore=tests/ops -k "cuda or gpu"
    # Each tensor in an allocation of its own, or memcheck sees PyTorch's large blocks instead of tensors.
    stage memcheck 65 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
      "$PYTHON" -m pytest -q tests/ops/test_cuda_device.py -k packs_and_single_values
    stage racecheck 65 compute-sanitizer --tool racecheck --error-exitcode 9 \
      "$PYTHON" -m pytest -q tests/ops/test_cuda_device.py -k "packs_and_single_values and float32"
  else
    stage bench-step 80 bash -c 'bench --suite step --compile no'
    stage bench-search 100 bash -c 'bench --suite search'
    stage bench-ops 40 bash -c 'bench --suite ops'
    stage bench-memory 30 bash -c 'bench --suite memory --compile no'
    stage bench-agree 30 bash -c 'bench --suite agreement'
    # Compiling takes minutes: last, and one small network alone.
    stage bench-compile 80 bash -c 'bench --suite step --network resnet20 --compile yes'
  fi
}

wheels() {
  # Into a folder of their own, which comes first; what is installed stays as it is.
  stage wheels 20 "$PYTHON" -m pip install --quiet --no-index --find-links wheels --no-deps --no-compile \
    --target "${scratch:-SCRATCH}/site" wheels/*.whl
}

if [ -n "$listing" ]; then
  stage() {
    printf '%s\t%s\t' "$1" "$2"
    shift 2
    printf '%q ' "$@"
    printf '\n'
  }
  [ "$mode" = bench ] || wheels
  run_stages
  exit 0
fi

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
SUMMARY=$OUT/gpu_$mode.txt
LOG=$OUT/gpu_$mode.log
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
cudnn = torch.backends.cudnn.version()
print(f"versions  torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}, Python {platform.python_version()}")
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
[ -n "${COMMIT:-}" ] || COMMIT=$(git rev-parse --short HEAD 2>/dev/null || true)
export COMMIT
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT

bench() { "$PYTHON" -m benchmarks --device cuda --profile quick --out "$OUT" --parts "$scratch/parts" "$@"; }
export -f bench
export PYTHON OUT scratch

if [ "$mode" = tests ] && [ -d wheels ]; then
  wheels
  export PYTHONPATH=$PYTHONPATH:$scratch/site
fi
run_stages

say ""
if [ "$failures" -gt 0 ]; then
  say "$failures stage(s) did not pass in $SECONDS s; see $LOG"
  exit 1
fi
say "all stages passed in $SECONDS s; results in $OUT"
