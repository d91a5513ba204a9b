#!/usr/bin/env bash
# Build the mmcv 2.1.0 wheel for this Python and torch, once, and print its path.
# The cache lies outside the checkout and is keyed by everything the binary depends on; pip's own wheel cache is not.
#
# Each of mmcv's 77 files parses the same torch headers. They are compiled once, into a precompiled header, and nothing
# writes debug information: a fifth of the time of mmcv's own build, and operators that compute the same.
set -euo pipefail
python=${1:?usage: build_mmcv.sh PYTHON}
version=2.1.0
export PATH="$(dirname "$python"):$PATH"  # the venv brings ninja
torch=$("$python" -c 'import torch; print(torch.__version__)')
tag=$("$python" -c 'import sys, platform; print(f"cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}")')
cache="${MDP_WHEEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mdp_mmdet3d/wheels}/mmcv-$version-torch-$torch-$tag"
wheel=$(ls "$cache"/*.whl 2>/dev/null | head -n 1 || true)
if [ -z "$wheel" ]; then
  echo "  building mmcv $version for torch $torch, $tag: 4 to 8 minutes on 2 cores, once" >&2
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  # What building needs and this Python lacks is beside it for the build only.
  if ! "$python" -c 'import ninja, pkg_resources, psutil, wheel' 2> /dev/null; then
    "$python" -m pip install -q --target "$work/tools" 'setuptools<81' wheel ninja psutil >&2
    export PYTHONPATH="$work/tools${PYTHONPATH:+:$PYTHONPATH}" PATH="$work/tools/bin:$PATH"
  fi
  "$python" -m pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$work" "mmcv==$version" >&2
  tar -xzf "$work"/mmcv-$version.tar.gz -C "$work"
  source="$work/mmcv-$version"
  # torch >= 2.14 headers demand C++20
  sed -i 's/-std=c++17/-std=c++20/g' "$source/setup.py"

  # CFLAGS replaces Python's own flags, so it carries all of them. The header is used only if it was compiled with the
  # flags of the files; one that does not fit is an error, not a slow build.
  header="$source/mmcv/ops/csrc/common/pytorch_cpp_helper.hpp"
  flags="-O2 -DNDEBUG -fwrapv -g0"
  export CC=${CC:-gcc} CXX=${CXX:-g++}
  includes=$("$python" -c 'import sysconfig; from torch.utils.cpp_extension import include_paths
print(*(f"-isystem {path}" for path in [*include_paths(), sysconfig.get_paths()["include"]]))')
  started=$SECONDS
  if "$CXX" --version | grep -qi 'gcc\|g++\|free software foundation'; then
    # shellcheck disable=SC2086 - words are wanted
    "$CXX" $flags -fPIC -std=c++20 -DTORCH_API_INCLUDE_EXTENSION_H -DTORCH_EXTENSION_NAME=_ext $includes \
      -x c++-header "$header" -o "$header.gch" >&2
    flags="$flags -include $header -Winvalid-pch -Werror=invalid-pch"
    echo "  torch headers compiled in $((SECONDS - started)) s" >&2
  fi  # another compiler keeps such headers in another way: without one the build is right, and slow
  started=$SECONDS
  (cd "$source" && MMCV_WITH_OPS=1 FORCE_CUDA=0 MAX_JOBS=$(nproc) PIP_NO_CACHE_DIR=1 CFLAGS="$flags" \
    "$python" -m pip wheel -v --no-deps --no-build-isolation -w "$work/out" . 2>&1 | tee "$work/build.log" \
    | while IFS= read -r line; do
        if [[ $line =~ ^\ *(\[[0-9]+/[0-9]+\]) ]]; then [ -t 2 ] && printf '\r  compiling mmcv %s ' "${BASH_REMATCH[1]}" >&2
        elif [[ $line == *rror:* ]]; then printf '\n%s\n' "$line" >&2; fi
        :
      done)
  echo "  mmcv compiled in $((SECONDS - started)) s" >&2
  mkdir -p "$cache.part"
  cp "$work"/out/*.whl "$cache.part/"
  rm -rf "$cache" && mv "$cache.part" "$cache"
  wheel=$(ls "$cache"/*.whl | head -n 1)
fi
echo "$wheel"
