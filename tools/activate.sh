# shellcheck shell=bash
# For scripts and make: put the environment's commands (venv or conda) first on PATH.
# Sourced; VENV names the environment, the checkout's .venv by default.
VENV=${VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)/.venv}
if [[ ! -x $VENV/bin/python ]]; then
    echo "no environment in $VENV: run tools/setup_env.sh first, or set VENV" >&2
    exit 1
fi
export PATH="$VENV/bin:$PATH"
