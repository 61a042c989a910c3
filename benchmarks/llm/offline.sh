#!/bin/sh
# Run the experiment on a machine without network, with the parts that bundle.py wrote.
#
#     sh benchmarks/llm/offline.sh PARTS WORK RESULTS [options of run.py]
#
# PARTS is the folder with all that bundle.py wrote; WORK is for what is unpacked; RESULTS gets results.tar. Packages that the parts
# bring are used for this run alone, and torch is the machine's own.
set -eu
parts=$1 work=$2 results=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
mkdir -p "$work" "$results"
PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTHONUNBUFFERED HF_HUB_OFFLINE
if [ ! -d "$work/model" ]; then
    python3 "$here/bundle.py" join "$parts" "$work"
    [ -d "$work/site" ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$work/site" "$parts"/wheels/*.whl
    PYTHONPATH="$work/site:$root:$root/benchmarks" python3 "$here/bundle.py" convert "$work"
fi
PYTHONPATH="$work/site:$root"
export PYTHONPATH
mkdir -p "$work/results"
[ -d "$work/results/work" ] || cp -r "$work/work" "$work/results/work"
exec python3 "$here/run.py" --data "$work/lamp" --backbone "$work/model" --encoder "$work/encoder" \
    --output "$work/results" --pack "$results" "$@"
