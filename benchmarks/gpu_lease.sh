#!/usr/bin/env bash
# Checks, measures and writes every table of the GPU engine in one call of under ten minutes.
#
#   bash benchmarks/gpu_lease.sh             on a machine with one NVIDIA GPU (compute capability 8.0 or newer)
#   bash benchmarks/gpu_lease.sh --dry-run   the same steps on a CPU, on tiny data; the tests are only found, not run,
#                                            and the figures mean nothing
#
# Nothing is installed: it needs Python 3.11 or newer with PyTorch (CUDA), Triton, NumPy, safetensors, tokenizers, rich,
# typer, pytest and pytest-timeout; pytest-xdist is used where it is there. Run it from a checkout, from anywhere.
#
# The loss curves need real text. Copy a few megabytes (.txt or .jsonl files, or a folder that `bitquest data prepare`
# wrote) into data/gpu-lease/, which git ignores, so that it travels with the working tree; TEXT names another place.
# Without it they are skipped.
#
# Environment:
#   OUT      where results go                        (benchmarks/results/gpu-<date>)
#   TEXT     text or prepared tokens                 (data/gpu-lease)
#   LIMIT    seconds in all; no step gets more than what is left of them  (560)
#   PYTHON   the interpreter                         (python3)
#   BACKEND  which code runs the layers              (auto)
#
# In $OUT afterwards: tests.txt (the GPU tests), gpu.json (every figure), curves.json, table.txt (one screen), log.txt.
# Exit code: 0 if the tests passed and nothing measured was wrong or failed, 1 if not; a step that was skipped says so
# and makes it 1 too. Partial results are kept whatever happens.
set -uo pipefail

dry=
[ "${1:-}" = --dry-run ] && dry=1 && shift
if [ $# -gt 0 ]; then
  echo "error: unknown argument $1; there is only --dry-run" >&2
  exit 2
fi

cd "$(dirname "$0")/.." || exit 2
began=$(date +%s)
all=${LIMIT:-560}
python=${PYTHON:-python3}
backend=${BACKEND:-auto}
text=${TEXT:-data/gpu-lease}
out=${OUT:-benchmarks/results/gpu-$(date +%F)${dry:+-dry-run}}
mkdir -p "$out" || exit 2
work=$(mktemp -d) || exit 2
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 COLUMNS=${COLUMNS:-160}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$work/inductor} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$work/triton}
export BITQUEST_CACHE=${BITQUEST_CACHE:-$work/bitquest}
[ -n "$dry" ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
: > "$out/log.txt"
warming=
exec 3>&1 # what this script says, also where a step's own output goes elsewhere

say() { echo "[$(($(date +%s) - began)) s] $*" | tee -a "$out/log.txt" >&3; }
fail() { echo "$*" >> "$work/failed"; } # a file: steps in pipes are subshells
left() { echo $((all - ($(date +%s) - began))); }

summary() { grep -E ' in [0-9]+\.[0-9]+s' "$out/tests.txt"; } # pytest's last line, of each time it ran

# run NAME LIMIT LEAST COMMAND…: at most LIMIT seconds and what is left; skipped where less than LEAST seconds are left.
run() {
  local name=$1 limit=$2 least=$3 remaining code
  shift 3
  remaining=$(left)
  if [ "$remaining" -lt "$least" ]; then
    say "$name: skipped, $remaining s are left and it needs $least"
    fail "$name"
    return 75
  fi
  [ "$limit" -gt "$remaining" ] && limit=$remaining
  say "$name: begins, at most $limit s"
  timeout --signal=INT --kill-after=10 "$limit" "$@"
  code=$?
  [ $code -ne 0 ] && fail "$name"
  case $code in
    0) say "$name: done" ;;
    124 | 137) say "$name: ended at its limit of $limit s; what it had is kept" ;;
    *) say "$name: exit code $code" ;;
  esac
  return $code
}

finish() {
  [ -n "$warming" ] && kill -TERM "$warming" 2>/dev/null && wait "$warming" 2>/dev/null
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader |
  tee -a "$out/log.txt"
say "revision $(git rev-parse --short HEAD 2>/dev/null || echo unknown), results in $out"

# While the tests run, another process compiles what the benchmark will run. Its figures and its tuning are thrown away.
if [ -z "$dry" ]; then
  BITQUEST_CACHE=$work/warming timeout --signal=TERM --kill-after=5 230 \
    "$python" -m bitquest.cli.app bench gpu --backend "$backend" --rounds 1 --budget 220 --out "$work/warm.json" \
    >/dev/null 2> "$work/warm.txt" &
  warming=$!
fi

# 1. The tests that need a GPU. In several processes where pytest-xdist is there: a kernel that loses the device then
# costs the tests of one process. What failed is tried again once, on its own.
tests=(-m pytest -m gpu -q ${dry:+--collect-only} -o filterwarnings=default -o cache_dir="$work/pytest" --timeout=90 --timeout-method=thread --tb=short)
places=()
for place in tests/ops tests/nn tests/models tests/inference tests/benchmarks; do [ -d $place ] && places+=("$place"); done
parallel=()
if [ -z "$dry" ] && "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n 12); fi
export BITQUEST_TUNE=0 # no time for it there, and its answers would be wrong beside other work
run "GPU tests" 200 60 "$python" "${tests[@]}" "${parallel[@]}" "${places[@]}" > "$out/tests.txt" 2>&1
code=$?
summary
[ $code -eq 5 ] && say "GPU tests: none were found"
if [ $code -eq 1 ] && [ "$(left)" -ge 330 ]; then
  echo "--- what failed, once more ---" >> "$out/tests.txt"
  if run "GPU tests once more" 40 40 "$python" "${tests[@]}" --lf "${places[@]}" >> "$out/tests.txt" 2>&1; then
    sed -i '/^GPU tests$/d' "$work/failed" # what failed beside other work passes on its own
  fi
  summary | tail -n 1
fi

unset BITQUEST_TUNE

if [ -n "$warming" ]; then
  while kill -0 "$warming" 2>/dev/null && [ "$(left)" -gt 370 ]; do sleep 1; done
  kill -TERM "$warming" 2>/dev/null
  wait "$warming" 2>/dev/null
  warming=
  say "compiling ahead: ended"
  sed 's/^/  /' "$work/warm.txt" >> "$out/log.txt"
fi

# 2. Every row of the table, correctness first.
budget=$(($(left) - 90))
[ $budget -gt 300 ] && budget=300
[ $budget -lt 30 ] && budget=30
options=(--backend "$backend" --budget "$budget" --out "$out/gpu.json")
[ -n "$dry" ] && options+=(--dry-run --rounds 1)
run "benchmark" $((budget + 15)) 30 "$python" -m bitquest.cli.app bench gpu "${options[@]}" --json 2>&1 >/dev/null | tee -a "$out/log.txt"

# 3. Loss curves of the fused path and of the reference, on real text.
curves=(--backend "$backend")
[ -n "$dry" ] && curves=(--preset 1M --steps 3 --last 2 --batch 2 --context 32 --seeds 2 --repeats 2 --backend torch)
if [ -n "$dry" ]; then
  cat docs/*.md docs/howto/*.md > "$work/text.txt"
  text=$work/text.txt
fi
if [ ! -e "$text" ]; then
  say "loss curves: skipped, there is no text in $text"
  fail "loss curves"
else
  tokens=$text tokenizer=bpe:4096
  [ -n "$dry" ] && tokenizer=byte
  if [ ! -f "$text/manifest.json" ]; then
    tokens=$work/tokens
    run "text to tokens" 60 30 "$python" -m bitquest.cli.app data prepare "$text" \
      --tokenizer $tokenizer --out "$tokens" >> "$out/log.txt" 2>&1
  fi
  remaining=$(($(left) - 20))
  [ -f "$tokens/manifest.json" ] && run "loss curves" 150 25 "$python" -m bitquest.cli.app bench loss-curves --data "$tokens" "${curves[@]}" \
    --budget $((remaining > 1 ? remaining * 3 / 4 : 1)) --out "$out/curves.json" 2>&1 | tee -a "$out/log.txt"
fi

# 4. One screen.
{
  summary
  [ -f "$out/gpu.json" ] && "$python" -m bitquest.benchmarks.gpu_report "$out/gpu.json"
  [ -f "$out/curves.json" ] && "$python" -m bitquest.benchmarks.gpu_report "$out/curves.json"
} > "$out/table.txt"
cat "$out/table.txt"
if [ -s "$work/failed" ]; then
  say "finished; not everything went well: $(sort -u "$work/failed" | paste -sd ',' | sed 's/,/, /g')"
  exit 1
fi
say "finished"
