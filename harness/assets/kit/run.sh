#!/usr/bin/env bash
# Runs `peft-harness night` on a machine without network. Arguments are those of `night`: bash run.sh --budget 9m --out OUT
# PYTHON names the interpreter that has torch; by default python3. Other commands: bash run.sh doctor, bash run.sh check ...
set -eu
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"
"$python" -I "$here/unpack.py" "$here/wheels" "$here/site" || exit 4
# The commands look for baselines in the current folder.
if [ -d "$here/source/results/baselines" ] && [ ! -e results/baselines ]; then mkdir -p results && cp -R "$here/source/results/baselines" results/; fi
if [ "${1:-}" = night ]; then shift; fi
case "${1:-}" in "" | -*) if [ -f "$here/half.yaml" ]; then set -- night --real "$here/half.yaml" "$@"; else set -- night "$@"; fi ;; esac
echo "note: before you run a \`peft-harness\` command that is printed here, run: export PATH=\"$here/bin:\$PATH\"" >&2
exec bash "$here/bin/peft-harness" "$@"
