#!/usr/bin/env bash
# vLLM's own sweep over servers: stock, radix, and radix with an option.
# Run: examples/sweep/run.sh MODEL [more options of `vllm bench sweep serve`]
set -euo pipefail
model=$1
shift
# Arms run one after the other and not in turns: repeat, and look at the spread.
exec vllm bench sweep serve \
  --serve-cmd "vllm serve $model --port ${PORT:-8131} ${SERVE_OPTIONS:-}" \
  --bench-cmd "vllm bench serve --model $model --port ${PORT:-8131} \
    --dataset-name prefix_repetition --num-prompts ${PROMPTS:-200} \
    --prefix-repetition-prefix-len 512 --prefix-repetition-suffix-len 64 \
    --prefix-repetition-num-prefixes 20 --prefix-repetition-output-len 32" \
  --serve-params "${SERVE_PARAMS:-$(dirname "$0")/serve.json}" \
  --num-runs "${RUNS:-5}" --output-dir "${OUTPUT:-results/sweep}" "$@"
