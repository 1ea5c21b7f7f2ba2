#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests on the device, then the benchmarks. Installs nothing.
#
#     benchmarks/gpu.sh [PYTHON]                     e.g. benchmarks/gpu.sh .venv/bin/python
#
# Goals at 32K tokens of the 8B shape in bfloat16 on one H200: "device" 10 ms, "pinned" with int8 45 ms, "disk-uncached"
# with int4 200 ms. Takes about 20 minutes, 60 GB of host memory, 40 GB of GPU memory, 5 GB under TMPDIR: set it to a
# directory on a local NVMe. SHAPE, LENGTHS, DEVICE, REPEATS, OUTPUT and BENCH_NOTE change what is measured; with
# DEVICE=cpu SHAPE=smoke LENGTHS=96 it shows that the script runs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
shape=${SHAPE:-llama-3.1-8b}
lengths=${LENGTHS:-1K,4K,16K,32K}
longest=${lengths##*,}
device=${DEVICE:-cuda}
repeats=${REPEATS:-5}
output=${OUTPUT:-benchmarks/results}

bench() {
    local name=$1
    shift
    echo "== $name: blockrag bench $*" >&2
    "$python" -m blockrag bench "$@" --shape "$shape" --device "$device" --dtype "$dtype" \
        --output "$output/$name" --note "${BENCH_NOTE:-}" > /dev/null
}

if [ "$device" = cuda ]; then
    command -v nvidia-smi > /dev/null || { echo "no nvidia-smi here: this script needs an NVIDIA GPU" >&2; exit 2; }
    nvidia-smi --query-gpu=name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max --format=csv
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__); torch.ones(1, device="cuda")'
    dtype=bfloat16 at_rest="bfloat16 int8 int4" modes=memory,pinned,device
    # Compiled kernels of all sizes, then whole prompts on the device.
    "$python" -m pytest -q -p no:cacheprovider tests/test_triton_place.py tests/test_device_pool.py
    "$python" -m pytest -q -p no:cacheprovider -m gpu tests
else
    dtype=float32 at_rest="float16 int8 int4" modes=memory
fi

for precision in $at_rest; do
    bench "gpu-$precision" ttft --lengths "$lengths" --modes "$modes" --precision "$precision" --repeats "$repeats" \
        --passages 0
done
# What it is compared with, once: the whole prompt prefilled, and the method's published code.
bench gpu-reference ttft --lengths "$lengths" --modes full,cold,seed,kept --repeats "$repeats" --passages 0
# From a local disk, its files dropped from the page cache before each request.
bench gpu-disk-int4 ttft --lengths "$longest" --modes disk-uncached,disk --precision int4 --repeats "$repeats" --passages 0
bench gpu-decode decode --lengths "$lengths" --repeats "$repeats" --batch-lengths 0
