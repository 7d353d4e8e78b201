#!/usr/bin/env bash
# Makes a virtual environment with PyTorch and with pfs_fast, compiled and installed.
#
#   scripts/environment.sh [EXTRA]
#
# EXTRA is a group of optional dependencies of pyproject.toml, such as test.
# VENV    the environment's folder; .venv in the checkout by default
# PYTHON  the Python to make it with; python3 by default
# Those of setup.py (PFS_FAST_CUDA, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CC, CXX, CUDA_HOME) hold too.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
python=${PYTHON:-python3}
extra=${1:-}
# No compiler is an error here: the commands that follow use the compiled operators.
export PFS_FAST_REQUIRE_EXT=${PFS_FAST_REQUIRE_EXT:-1}
export PIP_DISABLE_PIP_VERSION_CHECK=1

stamp=$venv/installed${extra:+-$extra}
sources=(pfs_fast csrc build_backend setup.py pyproject.toml version.txt constraints.txt)
if [[ -e $stamp ]]; then
  changed=$(find "${sources[@]}" scripts/environment.sh -type f -newer "$stamp" \
    -not -path '*/__pycache__/*' -not -name '*.so' -not -name _build_report.json -print -quit)
  [[ -n $changed ]] || exit 0
fi

if [[ ! -x $venv/bin/python ]]; then
  if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))'; then
    echo "environment.sh: $python must be Python 3.10 or newer with venv; set PYTHON=..." >&2
    exit 1
  fi
  echo "Making the environment $venv" >&2
  "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip install --quiet --constraint constraints.txt)

echo "Installing PyTorch (several gigabytes at the first time)" >&2
"${pip[@]}" torch torchvision
echo "Compiling and installing pfs_fast (some minutes)" >&2
# Setuptools would pack files that have left the source tree, but are still in its build folder.
rm -rf build/lib* build/bdist*
"${pip[@]}" ".${extra:+[$extra]}"
touch "$stamp"

# From the environment's folder, where the source tree does not hide what was installed.
(cd "$venv" && bin/python -c 'import pfs_fast; print(pfs_fast.backends())') >&2
