#!/usr/bin/env bash
# Tests the installed package, in an environment that environment.sh makes. Arguments go to pytest.
#
#   scripts/test.sh [-k NAME | -x | ...]
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
exec "$venv/bin/python" -m pytest -c ../pyproject.toml --rootdir .. "$@"
