#!/usr/bin/env bash
# The experiments that wait for a GPU, in pieces of under ten minutes: each call goes on where the last one stopped.
#
#   bash benchmarks/gpu_science.sh orderings     the paper's orderings at 3M and 10M, at three budgets
#   bash benchmarks/gpu_science.sh scaling       losses of 1M, 3M and 10M models in nine formats, and the law fitted to them
#   bash benchmarks/gpu_science.sh tournament    recipes against the paper's at W1A1, W2A2 and unquantized
#   bash benchmarks/gpu_science.sh --dry-run PART   the same steps on a CPU, on tiny data; the figures mean nothing
#
# Several small models train at once, as many as the card holds. Call it again until it says that a part is complete.
#
# Text: copy enwiki2015_train.jsonl.xz (and, for 97 M tokens, _train_b) and a validation file named *val* into
# data/gpu-science/, which git ignores; TEXT names another folder. It is tokenized on the machine, 4,096 words.
#
# Between machines: $OUT/PART.tar.gz has what was found so far, without weights (a run that was not over begins anew on
# another machine, and goes on on the same one). Put it into benchmarks/results/gpu-science/ and commit it; the next
# call takes it from there.
#
# Environment:
#   OUT      where results go               (benchmarks/results/gpu-science)
#   STATE    where earlier results lie      (benchmarks/results/gpu-science)
#   TEXT     text                           (data/gpu-science)
#   WORK     where the runs are             (runs/science)
#   LIMIT    seconds in all                 (570)
#   PYTHON   the interpreter                (python3)
# Exit code: 0 if the part is complete, 75 if it goes on, 1 if something failed.
set -uo pipefail

dry=
[ "${1:-}" = --dry-run ] && dry=1 && shift
part=${1:-}
case $part in
  orderings | scaling | tournament) ;;
  *)
    echo "error: name a part: orderings, scaling or tournament, got '$part'" >&2
    exit 2
    ;;
esac

cd "$(dirname "$0")/.." || exit 2
began=$(date +%s)
all=${LIMIT:-570}
python=${PYTHON:-python3}
text=${TEXT:-data/gpu-science}
results=benchmarks/results/gpu-science
out=${OUT:-$results} state=${STATE:-$results}
work=${WORK:-runs/science${dry:+-dry-run}}
mkdir -p "$out" "$work" || exit 2
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 COLUMNS=${COLUMNS:-160}
log=$out/$part.log.txt
: > "$log"

say() { echo "[$(($(date +%s) - began)) s] $*" | tee -a "$log"; }
left() { echo $((all - ($(date +%s) - began))); }
bitquest() { "$python" -m bitquest.cli.app "$@"; }

# What earlier calls found, unless it is here already.
if [ ! -d "$work/$part" ] && [ -f "$state/$part.tar.gz" ]; then
  tar -xzf "$state/$part.tar.gz" -C "$work" || exit 1
  say "goes on from $state/$part.tar.gz"
fi

# Tokens, once per machine.
data=$work/data
if [ ! -f "$data/manifest.json" ]; then
  tokenizer=bpe:4096 validation=()
  if [ -n "$dry" ]; then
    text=$work/text tokenizer=byte
    mkdir -p "$text"
    cat docs/*.md docs/howto/*.md > "$text/text.txt"
  fi
  if ! compgen -G "$text/*" > /dev/null; then
    say "error: there is no text in $text (see the head of this script)"
    exit 1
  fi
  inputs=()
  for file in "$text"/*; do
    case $file in *val*) validation+=(--val "$file") ;; *) inputs+=("$file") ;; esac
  done
  say "text to tokens"
  bitquest data prepare "${inputs[@]}" "${validation[@]}" --tokenizer $tokenizer --out "$data" >> "$log" 2>&1 || {
    tail -n 3 "$log"
    exit 1
  }
fi

unfinished=0 failed=0

# compare NAME CONFIG OPTION…: go on with one comparison for what time is left.
compare() {
  local name=$1 config=$2 remaining code
  shift 2
  remaining=$(($(left) - 20))
  if [ "$remaining" -lt 20 ]; then
    say "$name: waits for the next call"
    unfinished=1
    return
  fi
  say "$name: at most $remaining s"
  timeout --signal=INT --kill-after=15 "$remaining" "$python" -m bitquest.cli.app compare "$config" \
    --out "$work/$part/$name" --set "data.path=$data" "$@" >> "$log" 2>&1
  code=$?
  case $code in
    0) say "$name: complete" ;;
    124 | 130) say "$name: goes on in the next call" && unfinished=1 ;;
    1)
      if grep -q '"finished": true' "$work/$part/$name/results.json" 2> /dev/null; then
        say "$name: complete; not everything was as expected: $(tail -n 1 "$log")"
      else
        say "$name: $(tail -n 1 "$log")" && failed=1
      fi
      ;;
    *) say "$name: exit code $code: $(tail -n 1 "$log")" && failed=1 ;;
  esac
}

tiny=()
[ -n "$dry" ] && tiny=(--set "train.batch_size=2" --set "data.context=16" --set "train.device=cpu" --set "train.threads=1"
  --set "evaluate.batches=1" --rates 2e-3 --seeds 0 --jobs 2)
mkdir -p "$work/$part"

case $part in
  orderings)
    if [ -n "$dry" ]; then series="1M:2" tiny+=(--schemes "QuEST W4A4,BitNet b1.58"); else series="3M:500 10M:500 3M:2000 10M:2000 3M:8000 10M:8000"; fi
    for run in $series; do
      compare "${run%:*}-${run#*:}" configs/science/orderings.toml --set "model.preset=${run%:*}" \
        --set "train.steps=${run#*:}" "${tiny[@]}"
    done
    ;;
  scaling)
    # Tokens: 100 a parameter, at most four passes over 97 M; 64 × 512 = 32,768 a step.
    if [ -n "$dry" ]; then series="1M:2 1M:6 3M:2 3M:6" tiny+=(--schemes none,w1a1); else series="1M:1000 1M:3000 3M:3000 3M:9000 10M:3000 10M:11800"; fi
    for run in $series; do
      compare "${run%:*}-${run#*:}" configs/science/scaling.toml --set "model.preset=${run%:*}" \
        --set "train.steps=${run#*:}" "${tiny[@]}"
    done
    if [ $unfinished = 0 ] && [ $failed = 0 ]; then
      say "the law"
      bitquest scaling fit "$work/$part"/* --out "$out/scaling-law.json" 2>&1 | tee -a "$log" || failed=1
    fi
    ;;
  tournament)
    [ -n "$dry" ] && tiny+=(--set train.steps=2 --schemes "W1A1 quest,W1A1 muon")
    compare recipes configs/science/tournament.toml "${tiny[@]}"
    ;;
esac

# What was found, without weights and optimizer states.
tar -czf "$out/$part.tar.gz" -C "$work" --exclude='*.safetensors' --exclude='*.lock' "$part" || failed=1
[ $failed = 1 ] && say "$part: something failed; $log says more" && exit 1
[ $unfinished = 1 ] && say "$part: goes on; results so far in $out/$part.tar.gz" && exit 75
say "$part: complete, in $out/$part.tar.gz"
