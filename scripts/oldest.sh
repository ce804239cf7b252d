#!/usr/bin/env bash
# Do the fast tests pass with the oldest versions that pyproject.toml allows?  scripts/oldest.sh [options of pytest]
#
# Installs them into build/oldest with Python 3.10, or with the Python that PYTHON names.
set -euo pipefail
cd "$(dirname "$0")/.."
"${PYTHON:-python3.10}" -m venv build/oldest
. build/oldest/bin/activate
pip install --quiet uv
uv pip install --resolution lowest-direct -e '.[test]'
uv pip install --no-deps stable-diffusion-sdkit stable-audio-tools
ksag --version
python -m pytest -m "not slow" "$@"
