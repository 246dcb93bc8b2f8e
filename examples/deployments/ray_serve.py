"""Serves a model with radix on replicas of Ray Serve, which routes by prefixes.

Run: python examples/deployments/ray_serve.py MODEL
after: pip install "ray[serve]==2.60.0" (not `ray[llm]`, which asks for another vLLM).
Each replica needs a GPU, or --cpu.
"""

import argparse
import json

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_openai_app
from ray.serve.llm.request_router import PrefixCacheAffinityRouter

# `--radix` is a flag of `vllm serve`; here the scheduler is named, and its options go
# to "radix".
RADIX = {
    "scheduler_cls": "vllm_radix.RadixScheduler",
    "additional_config": {"radix": {"patience": 1.0}},
}


def app(model: str, replicas: int, engine: dict, cpu: bool):
    """Return the application: an OpenAI server before some replicas."""
    hardware = {"accelerator_config": {"kind": "cpu"}} if cpu else {}
    config = LLMConfig(
        model_loading_config={"model_id": "served", "model_source": model},
        engine_kwargs={**RADIX, **engine},
        deployment_config={
            "num_replicas": replicas,
            "request_router_config": RequestRouterConfig(
                request_router_class=PrefixCacheAffinityRouter,
                # Queues that differ by more are evened out, prefix or not.
                request_router_kwargs={"imbalanced_threshold": 16},
            ),
        },
        **hardware,
    )
    return build_openai_app({"llm_configs": [config]})


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cpu", action="store_true", help="replicas without a GPU")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--ray", type=json.loads, default={}, help="of ray.init")
    given = parser.parse_args()
    ray.init(**given.ray)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    serve.run(app(given.model, given.replicas, given.engine, given.cpu), blocking=True)


if __name__ == "__main__":
    main()
