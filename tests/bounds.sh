#!/usr/bin/env bash
# The suite with every warning an error, on the lowest versions that requirements.txt admits and on the newest.
#
#     tests/bounds.sh FOLDER      FOLDER gets two virtual environments of 6 GB each; they are kept
#
# PYTHON_LOWEST (python3.10) and PYTHON_NEWEST (python3) name the interpreters.
set -euo pipefail
[ $# = 1 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."

suite() { # suite NAME INTERPRETER REQUIREMENTS
    [ -x "$folder/$1/bin/python" ] || "$2" -m venv "$folder/$1"
    "$folder/$1/bin/python" -m pip install -q --disable-pip-version-check -r "$3" -r requirements-dev.txt
    "$folder/$1/bin/python" -c 'import sys, torch, torchvision, numpy
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__},", end=" ")
print(f"numpy {numpy.__version__}")'
    # The variable reaches the processes that tests start, too.
    PYTHONWARNINGS=error "$folder/$1/bin/python" -m pytest -q -W error
}

sed 's/>=/==/' requirements.txt > "$folder/lowest.txt"
suite lowest "${PYTHON_LOWEST:-python3.10}" "$folder/lowest.txt"
suite newest "${PYTHON_NEWEST:-python3}" requirements.txt
