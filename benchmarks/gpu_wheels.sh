#!/usr/bin/env bash
# Fills a folder with the wheels that benchmarks/gpu.sh needs on an offline machine that has torch, Triton, timm and
# pytest, but not DeepSpeed, diffusers, FastAPI and what they import. Run it where there is a network, then carry the
# folder along.
#
#   benchmarks/gpu_wheels.sh DIR PYTHON_VERSION [--public CHECKOUT] [NAME[==VERSION] ...]
#
# PYTHON_VERSION is the GPU machine's, 3.10 to 3.13. --public copies the files of a checkout of the public REPA code
# that the comparison needs. A NAME is one more wheel, or another version of one of ours. MACHINE=aarch64 is for ARM.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() {
    echo "gpu_wheels: error: $1; use: benchmarks/gpu_wheels.sh DIR PYTHON_VERSION [--public CHECKOUT] [NAME==VERSION ...]" >&2
    exit 64
}
pip() { "${PYTHON:-python3}" -m pip --disable-pip-version-check "$@" --quiet; }

case ${1-} in
-h | --help)
    sed -n '/^# /s/^# //p; /^set /q' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
[ $# -ge 2 ] || usage "DIR and PYTHON_VERSION are needed"
out=$1 version=$2
shift 2
[[ $out != -* ]] || usage "DIR $out looks like an option"
[[ $version =~ ^3\.1[0-3]$ ]] || usage "PYTHON_VERSION $version must be one of 3.10 to 3.13"
deepspeed=$(grep '^deepspeed==' "$root/constraints.txt")
# What DeepSpeed imports when it starts, beyond torch, numpy, packaging and tqdm, which come with torch and timm.
needs=(einops hjson msgpack psutil pydantic) extra=() public=""
# What sampling, preparing and serving import. Without dependencies: numpy and Pillow are the machine's own.
serving=(annotated-doc anyio certifi charset-normalizer click diffusers fastapi h11 httpcore httpx idna
    importlib-metadata opentelemetry-api prometheus-client regex requests sniffio starlette urllib3 uvicorn zipp)
while [ $# -gt 0 ]; do
    case ${1%%==*} in
    --public)
        [ $# -ge 2 ] || usage "--public needs a folder"
        public=$2
        shift
        for file in loss.py models/sit.py; do
            [ -f "$public/$file" ] || usage "--public $public is not a checkout of the public REPA code (no $file)"
        done
        ;;
    deepspeed) deepspeed=$1 ;;
    einops | hjson | msgpack | psutil | pydantic) needs+=("$1") ;;
    -*) usage "unknown option $1" ;;
    *) extra+=("$1") ;;
    esac
    shift
done

mkdir -p "$out"
! compgen -G "$out/*.whl" >/dev/null || usage "DIR $out holds wheels already; choose a new folder"
machine=${MACHINE:-x86_64}
target=(--only-binary=:all: --python-version "$version" --dest "$out"
    --platform "manylinux_2_28_$machine" --platform "manylinux2014_$machine")
# DeepSpeed has a source package alone; without its compiled operators it is pure Python.
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip wheel --no-deps --wheel-dir "$out" "$deepspeed"
pip download "${target[@]}" "${needs[@]}"
pip download --no-deps "${target[@]}" --constraint "$root/constraints.txt" "${serving[@]}"
[ ${#extra[@]} -eq 0 ] || pip download --no-deps "${target[@]}" "${extra[@]}"
if [ -n "$public" ]; then
    mkdir -p "$out/public/models"
    cp "$public/loss.py" "$out/public/"
    cp "$public/models/sit.py" "$out/public/models/"
    [ ! -f "$public/LICENSE" ] || cp "$public/LICENSE" "$out/public/"
fi
git -C "$root" rev-parse --short HEAD >"$out/commit" 2>/dev/null || rm -f "$out/commit"
printf '%s: %d wheels for Python %s, %s KiB%s\n' "$out" "$(find "$out" -name '*.whl' | wc -l)" "$version" \
    "$(du -sk --apparent-size "$out" | cut -f1)" "${public:+, with the public code}"
