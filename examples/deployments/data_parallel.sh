#!/usr/bin/env bash
# Two engines with radix in one server, behind vLLM's own router.
#
#   examples/deployments/data_parallel.sh MODEL [options of vllm serve]
#
# Clients use http://127.0.0.1:30000/v1. Needs `pip install vllm-router==0.1.17`, and
# a GPU for each engine. Ends both when either ends, or on Ctrl-C.
#
# The environment changes what both are told: ENGINES (2), POLICY (cache_aware, by what
# was sent where, or kv_aware, by what engines say that they hold), PORT (8000) of the
# server and ROUTER_PORT (30000), whose metrics have the next one. BLOCK_SIZE (16) is the
# cache's. With kv_aware, EVENTS_PORT (5557) is that of the first engine's events, and the
# next engine has the next.
set -euo pipefail

model=${1:?usage: data_parallel.sh MODEL [options of vllm serve]}
shift
: "${ENGINES:=2}" "${POLICY:=cache_aware}" "${BLOCK_SIZE:=16}"
: "${PORT:=8000}" "${ROUTER_PORT:=30000}" "${EVENTS_PORT:=5557}"
url=http://127.0.0.1:$PORT

refuse() {
  echo "data_parallel.sh: $1" >&2
  exit 2
}

for name in ENGINES BLOCK_SIZE PORT ROUTER_PORT EVENTS_PORT; do
  [[ ${!name} =~ ^[1-9][0-9]{0,4}$ ]] && ((${!name} <= 65535)) ||
    refuse "$name is '${!name}'; allowed: 1 to 65535"
done
[[ $POLICY =~ ^(cache|kv)_aware$ ]] ||
  refuse "POLICY is '$POLICY'; allowed: cache_aware, kv_aware"
# What the router is told of the server, the server is told by the same variable.
for word in "$@"; do
  option=${word%%[=.]*}
  case ${option//_/-} in
    --data-parallel-size | -dp) by=ENGINES ;;
    --block-size) by=BLOCK_SIZE ;;
    --port) by=PORT ;;
    --kv-events-config) by="POLICY and EVENTS_PORT" ;;
    --host | --uds | --ssl-* | --model | --served-model-name | --headless | \
      --data-parallel-* | -dp?) by="the script itself" ;;
    *) continue ;;
  esac
  refuse "$word would contradict what the router is told; it is set by $by"
done

# --enable-scale-out: the router asks the server for the tokens of a text.
server=(--host 127.0.0.1 --port "$PORT" --block-size "$BLOCK_SIZE" --enable-scale-out
  --served-model-name "$model" --data-parallel-size "$ENGINES")
router=(--port "$ROUTER_PORT" --prometheus-port "$((ROUTER_PORT + 1))" --policy "$POLICY"
  --worker-urls "$url" --intra-node-data-parallel-size "$ENGINES")
ports=("$PORT" "$ROUTER_PORT" "$((ROUTER_PORT + 1))")
if [[ $POLICY == kv_aware ]]; then
  events=
  for ((rank = 0; rank < ENGINES; rank++)); do
    ports+=("$((EVENTS_PORT + rank))")
    events+=${events:+,}tcp://127.0.0.1:${ports[-1]}
  done
  # The topic of the events stays empty, and the star makes vLLM listen.
  server+=(--kv-events-config "{\"enable_kv_cache_events\": true, \"publisher\": \"zmq\", \
\"endpoint\": \"tcp://*:$EVENTS_PORT\"}")
  router+=(--kv-event-source "$url=$events" --kv-event-block-size "$BLOCK_SIZE"
    --kv-event-model "$model")
else
  # An engine gets others' requests once it has this many fewer than the fullest; the
  # default of 64 is seldom reached.
  router+=(--balance-abs-threshold 8)
fi
[[ -z $(printf '%s\n' "${ports[@]}" | sort | uniq -d) ]] ||
  refuse "two of the ports ${ports[*]} are the same; allowed: ones that differ"

trap 'trap - EXIT; kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The last word is the script's, over a file of --config as well.
vllm serve "$model" --radix "$@" "${server[@]}" &
# The router waits until the server is up.
vllm-router "${router[@]}" --worker-startup-timeout-secs 1800 \
  --worker-startup-check-interval 2 &
wait -n
