"""Stands for `vllm serve`: answers as it does, without a model, in a second.

Started as a program. What it caches is whole prompts and answers: with radix in
full, otherwise in blocks of 16. STUB_FAULT makes it fail, in one way a name.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys

from aiohttp import web

BLOCK = 16


class Stub:
    def __init__(self, radix, fault, blocks):
        self.radix, self.fault, self.blocks = radix, fault, blocks
        self.known = []
        self.counts = dict.fromkeys(
            ("prompt_tokens", "prompt_tokens_cached", "generation_tokens",
             "num_preemptions", "prefix_cache_hits", "prefix_cache_queries"), 0,
        )  # fmt: skip
        self.running = 0
        self.asked = 0

    def hits(self, prompt):
        best = 0
        for known in self.known:
            same = 0
            for mine, theirs in zip(prompt, known, strict=False):
                if mine != theirs:
                    break
                same += 1
            best = max(best, same if self.radix else same // BLOCK * BLOCK // 2)
        return min(best, len(prompt) - 1)

    async def completions(self, request):
        body = await request.json()
        prompt, self.asked = body["prompt"], self.asked + 1
        if self.fault == "refuse" or (
            self.fault == "refuse some" and self.asked % 3 == 0
        ):
            return web.json_response({"error": {"message": "too long"}}, status=400)
        self.running += 1
        if self.fault == "die" and self.asked == 3:
            print("ValueError: the stub was told to die", flush=True)
            os._exit(7)
        if self.fault == "kill" and self.asked == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hang" and self.asked >= 3:
            await asyncio.sleep(1000)
        found = self.hits(prompt)
        self.known.append(prompt)
        for name, value in (
            ("prompt_tokens", len(prompt)), ("prompt_tokens_cached", found),
            ("prefix_cache_hits", found), ("prefix_cache_queries", len(prompt)),
        ):  # fmt: skip
            self.counts[name] += value
        reply = web.StreamResponse()
        await reply.prepare(request)
        await asyncio.sleep(0.002 if self.radix else 0.004)
        answer = []
        for at in range(body["max_tokens"]):
            token = (sum(prompt) * 31 + at) % 900
            if self.fault == "other" and self.radix and at == 1:
                token += 1
            answer.append(token)
            choice = {"token_ids": [token], "text": "x"}
            if body.get("logprobs"):
                gap = 5.0 if at else 0.0
                choice["logprobs"] = {
                    "top_logprobs": [
                        {f"token_id:{token}": -0.1, "token_id:999": -0.1 - gap}
                    ]
                }
            event = json.dumps({"choices": [choice]})
            await reply.write(f"data: {event}\n\n".encode())
        await reply.write(b"data: [DONE]\n\n")
        self.counts["generation_tokens"] += len(answer)
        self.known.append(prompt + answer)
        self.running -= 1
        return reply

    async def metrics(self, request):
        lines = [f'vllm:{n}_total{{engine="0"}} {v}' for n, v in self.counts.items()]
        lines += [f'vllm:num_requests_running{{engine="0"}} {self.running}']
        lines += ['vllm:num_requests_waiting{engine="0"} 0']
        if self.fault != "no metrics":
            lines.append(
                f'vllm:cache_config_info{{num_gpu_blocks="{self.blocks}",'
                f'block_size="{BLOCK}",kv_cache_size_tokens="{self.blocks * BLOCK}"}} 1'
            )
        if self.radix:
            lines.append('vllm_radix:info{version="0"} 1')
        return web.Response(text="\n".join(lines) + "\n")

    async def reset(self, request):
        self.known.clear()
        return web.Response()


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int)
    parser.add_argument("--radix")
    parser.add_argument("--num-gpu-blocks-override", type=int, default=64)
    arguments, _ = parser.parse_known_args()
    radix = arguments.radix is not None
    fault, _, arm = os.environ.get("STUB_FAULT", "").partition("@")
    if arm and arm != ("radix" if radix else "stock"):
        fault = ""
    if fault == "never up":
        print("RuntimeError: no memory for the stub", flush=True)
        sys.exit(1)
    if fault == "slow":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        asyncio.run(asyncio.sleep(1000))
    # As vLLM does, it leaves work to another process, which may outlive it.
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print(f"engine {engine.pid}", flush=True)
    print("INFO dtype=torch.float32, model=stub", flush=True)
    if radix:
        print("INFO vllm-radix 0 on stub", flush=True)
    blocks = arguments.num_gpu_blocks_override + (fault == "other cache")
    stub = Stub(radix, fault, blocks)
    app = web.Application()
    app.router.add_post("/v1/completions", stub.completions)
    app.router.add_get("/metrics", stub.metrics)
    app.router.add_post("/reset_prefix_cache", stub.reset)

    async def models(request):
        return web.json_response({"data": [{"id": "stub", "max_model_len": 4096}]})

    app.router.add_get("/v1/models", models)

    async def health(request):
        return web.Response()

    app.router.add_get("/health", health)
    web.run_app(app, host="127.0.0.1", port=arguments.port, print=None)


if __name__ == "__main__":
    main()
