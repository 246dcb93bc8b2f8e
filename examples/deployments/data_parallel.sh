#!/usr/bin/env bash
# Two engines with radix in one server, behind vLLM's own router.
#
#   examples/deployments/data_parallel.sh MODEL [options of vllm serve]
#
# Clients use http://127.0.0.1:30000/v1. Needs `pip install vllm-router==0.1.17`, and
# a GPU for each engine. Ends both when either ends, or on Ctrl-C.
#
# ENGINES (2), POLICY (kv_aware or cache_aware), PORT (8000) and ROUTER_PORT (30000) of
# the environment change what their names say; EVENTS_PORT (5557) is that of the first
# engine's events, the next has the next port. BLOCK_SIZE (16) is the cache's.
set -euo pipefail

model=${1:?usage: data_parallel.sh MODEL [options of vllm serve]}
shift
engines=${ENGINES:-2} policy=${POLICY:-kv_aware} port=${PORT:-8000}
router_port=${ROUTER_PORT:-30000} events_port=${EVENTS_PORT:-5557}
block_size=${BLOCK_SIZE:-16} url=http://127.0.0.1:$port

trap 'trap - EXIT; kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# --enable-scale-out: the router asks the server for the tokens of a text.
# The topic of the events stays empty, and the star makes vLLM listen.
vllm serve "$model" --radix --port "$port" --block-size "$block_size" \
  --data-parallel-size "$engines" --enable-scale-out --kv-events-config \
  "{\"enable_kv_cache_events\": true, \"publisher\": \"zmq\", \"endpoint\": \"tcp://*:$events_port\"}" \
  "$@" &

events=
for ((rank = 0; rank < engines; rank++)); do
  events+=${events:+,}tcp://127.0.0.1:$((events_port + rank))
done
options=(--policy "$policy" --intra-node-data-parallel-size "$engines")
if [[ $policy == kv_aware ]]; then
  options+=(--kv-event-source "$url=$events" --kv-event-block-size "$block_size"
    --kv-event-model "$model")
fi
# It waits until the server is up.
vllm-router --port "$router_port" --prometheus-port "$((router_port + 1))" \
  --worker-urls "$url" --worker-startup-timeout-secs 1800 \
  --worker-startup-check-interval 2 "${options[@]}" &
wait -n
