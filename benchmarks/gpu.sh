#!/usr/bin/env bash
# What a GPU has to show, in one command for a machine that is there for minutes: is it right, how fast is it, where does
# the time go, and what do others take; then all tests and the sanitizers.
#
#   benchmarks/gpu.sh OUT [WHEELS]
#
# Needs Python with a CUDA build of torch, and no network. WHEELS (or $WHEELS) is a folder filled by gpu_wheels.sh; of it
# only what is not installed yet is used, from a temporary folder: nothing is installed into the machine's Python.
# The tests of the CUDA kernels come first, and nothing is timed before they pass. Any other step that fails or has no
# time is noted, and the rest goes on. Each step and each case is in OUT (README.md, results.json, log.txt) as soon as it
# is done. Environment: LIMIT, seconds in all (570); PYTHON; STEPS, which of them; SELECT, a pattern of cases; and
# GPU_DRY_RUN=1, which runs everything at tiny sizes on the CPU, to test this script.
set -uo pipefail
out=$(realpath -m "${1:?OUT, the folder for the results, is missing}")
wheels=${2:-${WHEELS:-}}
[[ -z $wheels ]] || wheels=$(realpath "$wheels")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
limit=${LIMIT:-570}
dry=${GPU_DRY_RUN:-}
options=(${dry:+--dry-run} ${SELECT:+--select "$SELECT"})  # of gpu.py
steps=${STEPS:-first headlines profile rivals small tests memcheck synccheck racecheck initcheck tuning training}

if [[ -e $out/results.json ]] && ! grep -q '"form": 2' "$out/results.json"; then
  echo "$out has results of an earlier form of this benchmark; name another folder" >&2
  exit 1
fi
mkdir -p "$out"
work=$(mktemp -d)
export PYTHONPATH=$work/site:$PWD:$PWD/python PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
: >"$out/log.txt"
: >"$out/steps.tsv"
ahead=()  # the processes that compile ahead
trap 'rm -rf "$work"; kill "${ahead[@]}" 2>/dev/null' EXIT

note() {  # NAME STATE REMARK
  printf '%s\t%s\t%s\n' "$1" "$2" "${3//$'\t'/ }" | tee -a "$out/steps.tsv"
}

wanted() { [[ " wheels info $steps " == *" $1 "* ]]; }

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }

# stage NAME SECONDS COMMAND...: runs it for at most that long; the log gets its output at once, the remark its last line.
stage() {
  local name=$1 most=$2 begun=$SECONDS status=0 state last
  shift 2
  if ! wanted "$name"; then
    note "$name" "not run" "not asked for"
    return 1
  fi
  ((most <= limit - SECONDS)) || most=$((limit - SECONDS))
  if ((most < 5)); then
    note "$name" "not run" "no time left"
    return 1
  fi
  printf '\n==== %s: %.150s\n' "$name" "${*//$'\n'/ }" >>"$out/log.txt"
  timeout --kill-after=5 "$most" "$@" >>"$out/log.txt" 2>&1 </dev/null || status=$?
  case $status in
    0) state=ok ;;
    124 | 137) state="stopped" ;;
    *) state="FAILED" ;;
  esac
  last=$(tail -n 99 "$out/log.txt" | grep -v '^[[:space:]]*$' | tail -n 1 | sed "s#$PWD/##g" | cut -c 1-150)
  note "$name" "$state" "$((SECONDS - begun)) s: $last"
  return $status
}

tests() {  # NAME SECONDS ARGUMENT...
  local name=$1 most=$2 how=(-q -p no:cacheprovider --no-header)
  shift 2
  if has xdist; then how+=(-n "$processes"); fi
  if has pytest_timeout; then how+=(--timeout 60); fi
  stage "$name" "$most" "$python" -m pytest "${how[@]}" "$@"
}

timings() {  # PART SECONDS
  stage "$1" $(($2 + 30)) "$python" benchmarks/gpu.py "$out" --part "$1" --seconds "$2" "${options[@]}"
}

install_wheels='  # those whose distribution is not there
import importlib.metadata, pathlib, subprocess, sys

def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

wanted = [w for w in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")) if not installed(w.name.split("-")[0])]
pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", sys.argv[2]]
done = [w.name.split("-")[0] for w in wanted if subprocess.run([*pip, str(w)]).returncode == 0]
print("installed", *done or ["nothing"])
'

# ---- what is here ---------------------------------------------------------------------------------------------------
if [[ -n $wheels ]]; then
  stage wheels 60 "$python" -c "$install_wheels" "$wheels" "$work/site"
fi
if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>>"$out/log.txt" && [[ -z $dry ]]; then
  note gpu "not run" "torch sees no GPU here"
  "$python" benchmarks/gpu_report.py "$out"
  exit 1
fi
stage info 30 "$python" -m sslkern.info
processes=$(($(nproc) / 2))
((processes <= 8)) || processes=8
((processes >= 1)) || processes=1

# ---- is it right: the CUDA kernels' tests, and beside them the compiling ahead --------------------------------------
parts=$(((processes + 2) / 3))
for ((part = 0; part < parts; part++)); do
  wanted headlines || break
  TORCHINDUCTOR_COMPILE_THREADS=4 timeout 120 "$python" benchmarks/gpu.py --warm $part $parts "${options[@]}" \
    >"$work/warm-$part.txt" 2>&1 </dev/null &
  ahead+=($!)
done
right=yes
if wanted first; then
  tests first 120 tests/gpu/test_cuda_backend.py tests/test_small_batches.py tests/ops \
    -k "cuda and not emulated and not compile and not opcheck" || right=
fi
if ((${#ahead[@]})); then
  wait "${ahead[@]}"
  cat "$work"/warm-*.txt >>"$out/log.txt"
fi
ahead=()

# ---- how fast is it, where does the time go, what do others take ----------------------------------------------------
if [[ -n $right ]]; then
  timings headlines 200
  timings profile 40
  timings rivals 60
  timings small 60
else
  note headlines "not run" "the tests that come first did not pass"
fi

# ---- all tests, and the sanitizers ----------------------------------------------------------------------------------
tests tests 120 tests/ops tests/functional tests/gpu -k "${GPU_TESTS:-(triton or cuda) and not emulated and not resources}"
for tool in memcheck synccheck racecheck initcheck; do
  if ! command -v compute-sanitizer >/dev/null; then
    note "$tool" "not run" "compute-sanitizer is not installed"
  else
    stage "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" benchmarks/gpu.py --exercise
  fi
done

# ---- what Triton finds, and a training run --------------------------------------------------------------------------
stage tuning 40 "$python" -m sslkern.backends.triton.tuning
if stage training 75 "$python" -m ssltrain simclr --data mnist5k --minutes "${GPU_MINUTES:-0.5}" --out "$work/run" \
  --json "$out/training.json"; then
  cp "$work/run/report.png" "$out/training.png"
fi

"$python" benchmarks/gpu_report.py "$out"
