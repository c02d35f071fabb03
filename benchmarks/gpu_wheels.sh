#!/usr/bin/env bash
# Fetches what `benchmarks/gpu.sh` may need on a machine without network: wheels for Python 3.12 on x86-64 Linux.
#
#   benchmarks/gpu_wheels.sh DIR
set -euo pipefail
dir=${1:?the folder for the wheels is missing}
python=${PYTHON:-python3}

# Rivals; the trainers; the tests. One version of each, and no requirements: torch and triton are there.
wheels=(
  memeff==0.3.1 inf-cl==1.2.1 cut-cross-entropy==25.1.1 siglip-kernel==0.1.2 pytorch-metric-learning==2.9.0
  info-nce-pytorch==0.1.4
  kornia==0.9.0 kornia-rs==0.2.0 mlxtend==0.25.0
  hypothesis==6.170.17 sortedcontainers==2.4.0 pytest==9.2.0 pytest-timeout==2.4.0 iniconfig==2.3.0 pluggy==1.6.0
)
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux2010 manylinux1; do
  platforms+=(--platform "${tag}_x86_64")
done

missing=()
for wheel in "${wheels[@]}"; do
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d "$dir" "$wheel" || missing+=("$wheel")
done
du -sh "$dir"
if ((${#missing[@]})); then
  echo "not fetched, and so not run: ${missing[*]}" >&2
  exit 1
fi
