#!/usr/bin/env bash
# Measures again what benchmarks/results holds, on a CPU: one to two hours on a quiet machine with two cores.
#
#     benchmarks/run.sh [BLOCKRAG] [PART ...]        e.g. benchmarks/run.sh .venv/bin/blockrag tiny memory
#
# Parts: tiny, 100m, 1b, decode, compose, prebuild, memory (all of these by default), and 1b-32k, whose full prefill
# alone takes 15 to 25 minutes and whose process takes 20 GB. BENCH_NOTE is kept with the results.
set -euo pipefail
cd "$(dirname "$0")/.."
blockrag=${1:-blockrag}
shift || true
parts=${*:-tiny 100m 1b decode compose prebuild memory}

run() {
    echo "== blockrag bench $*" >&2
    "$blockrag" bench "$1" --output benchmarks/results "${@:2}" --device cpu --note "${BENCH_NOTE:-}" > /dev/null
}

for part in $parts; do
    case $part in
    tiny) run ttft --shape tiny-15m --lengths 50,128,256,512,1K,2K,4K,8K,16K,32K --repeats 3 --once full,stock,cold ;;
    100m) run ttft --shape 100m --lengths 50,128,256,512,1K,2K,4K,8K --repeats 3 ;;
    1b) run ttft --shape llama-3.2-1b --lengths 256,512,1K,2K,4K,8K --repeats 3 --once full,stock,cold ;;
    1b-32k)
        run ttft --shape llama-3.2-1b --lengths 32K --modes full,seed,disk,memory,kept --once full --repeats 3 \
            --output benchmarks/results/32k
        ;;
    decode)
        run decode --shape tiny-15m --lengths 2K,32K --repeats 5
        run decode --shape llama-3.2-1b --lengths 2K --batch-lengths 512 --new-tokens 16 --repeats 3
        ;;
    compose)
        run compose --shape tiny-15m
        run compose --shape llama-3.2-1b
        ;;
    prebuild)
        run prebuild --shape tiny-15m
        run prebuild --shape 100m
        ;;
    memory) run memory --shape tiny-15m --length 32K ;;
    *)
        echo "unknown part '$part'" >&2
        exit 2
        ;;
    esac
done
