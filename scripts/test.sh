#!/usr/bin/env bash
# Tests the installed package, in an environment that environment.sh makes. Arguments go to pytest.
#
#   scripts/test.sh [-k NAME | -x | ...]
#
# JOBS  processes that share the tests; by default one a core, at most 4, since each needs about a gigabyte
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/environment.sh test
venv=$(cd "${VENV:-.venv}" && pwd)

# Python puts the current folder first on its path, and the folder pfs_fast of the checkout has no compiled
# library. In tests/ there is no such folder, so that the installed package is the one that is found.
cd tests
"$venv/bin/python" - <<'CHECK'
import pathlib, pfs_fast
found = pathlib.Path(pfs_fast.__file__).resolve().parent
if found == pathlib.Path("../pfs_fast").resolve():
    raise SystemExit(f"test.sh: the installed package must be tested, got the source tree {found}")
CHECK

cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN || echo 1)
jobs=${JOBS:-$((cores < 4 ? cores : 4))}
if ((jobs > 1)); then
  # Threads of several processes on the same cores wait for each other most of the time.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  set -- --numprocesses "$jobs" --dist worksteal "$@"
fi
exec "$venv/bin/python" -m pytest -c ../pyproject.toml --rootdir .. "$@"
