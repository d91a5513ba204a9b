#!/usr/bin/env bash
# Build the mmcv 2.1.0 wheel for this Python and torch, once, and print its path.
# The cache lies outside the checkout and is keyed by everything the binary depends on; pip's own wheel cache is not.
set -euo pipefail
python=${1:?usage: build_mmcv.sh PYTHON}
version=2.1.0
export PATH="$(dirname "$python"):$PATH"  # the venv brings ninja
torch=$("$python" -c 'import torch; print(torch.__version__)')
tag=$("$python" -c 'import sys, platform; print(f"cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}")')
cache="${MDP_WHEEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mdp_mmdet3d/wheels}/mmcv-$version-torch-$torch-$tag"
wheel=$(ls "$cache"/*.whl 2>/dev/null | head -n 1 || true)
if [ -z "$wheel" ]; then
  echo "building mmcv $version for torch $torch, $tag: about 10 minutes on 2 cores, once" >&2
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  "$python" -m pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$work" "mmcv==$version" >&2
  tar -xzf "$work"/mmcv-$version.tar.gz -C "$work"
  # torch >= 2.14 headers demand C++20
  sed -i 's/-std=c++17/-std=c++20/g' "$work/mmcv-$version/setup.py"
  (cd "$work/mmcv-$version" && MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=$(nproc) PIP_NO_CACHE_DIR=1 \
    "$python" -m pip wheel -v --no-deps --no-build-isolation -w "$work/out" . 2>&1 \
    | while IFS= read -r line; do
        if [[ $line =~ ^\ *(\[[0-9]+/[0-9]+\]) ]]; then printf '\r  compiling mmcv %s ' "${BASH_REMATCH[1]}" >&2
        elif [[ $line == *rror:* ]]; then printf '\n%s\n' "$line" >&2; fi
      done)
  echo >&2
  mkdir -p "$cache.part"
  cp "$work"/out/*.whl "$cache.part/"
  rm -rf "$cache" && mv "$cache.part" "$cache"
  wheel=$(ls "$cache"/*.whl | head -n 1)
fi
echo "$wheel"
