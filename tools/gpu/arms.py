"""Starts arms, asks them, ends them; their models, their traffic, their answers.

An arm is a process with an engine (``engine_arm.py``). The parent imports neither
vLLM nor torch before it writes a model with weights.
"""

import itertools
import json
import os
import select
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Json = dict[str, Any]

GAP = 1e-3
"""Difference of the two likeliest tokens' log-probabilities that is a tie."""

_ARM = Path(__file__).resolve().parent / "engine_arm.py"


class ArmError(RuntimeError):
    """An arm died, or says nothing; the message has the end of its log."""


class Arm:
    """A running engine.

    Args:
        name: of the arm, and of its log.
        settings: see ``engine_arm``.
        logs: folder of the log.
        environment: of the process; None for this one's.
    """

    def __init__(
        self,
        name: str,
        settings: Json,
        logs: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, logs / f"{name}.log"
        self.description: Json = {}
        reading, writing = os.pipe()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(_ARM), json.dumps(settings), str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                env=environment,
                text=True,
            )
        os.close(writing)
        self._replies = os.fdopen(reading)

    def wait(self, seconds: float) -> Json:
        """Return what the arm is, once it is up."""
        self.description = self._reply(seconds)
        return self.description

    def ask(self, job: Json, seconds: float = 600.0) -> Json:
        """Run a job, and return its result.

        Raises:
            ArmError: the arm died, or took too long.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._reply(seconds)

    def _reply(self, seconds: float) -> Json:
        ready, _, _ = select.select([self._replies], [], [], seconds)
        line = self._replies.readline() if ready else ""
        if not line:
            what = f"said nothing for {seconds:.0f} s"
            if ready:
                what = f"died with status {self.process.wait(30)}"
            lines = self.log.read_text(errors="replace").splitlines()
            errors = [text for text in lines if "Error" in text][-3:]
            tail = " | ".join(errors + lines[-6:])[-1800:]
            raise ArmError(f"{self.name} {what}: {tail}")
        reply: Json = json.loads(line)
        return reply

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._replies.close()


def requests_of(roots: Iterable[Any]) -> list[Json]:
    """Return a forest of turns (``vllm_radix_bench.workloads.turn``) as requests."""
    out: list[Json] = []

    def add(turn: Any, name: str, after: str | None) -> None:
        out.append(
            {
                "id": name,
                "after": after,
                "tokens": list(turn.tokens),
                "max_tokens": turn.max_tokens,
            }
        )
        for number, child in enumerate(turn.children):
            add(child, f"{name}.{number}", name)

    for number, root in enumerate(roots):
        add(root, str(number), None)
    return out


def encode_with(vocabulary: int) -> Callable[[str], list[int]]:
    """Return an encoder of words, for a model without a tokenizer."""

    def encode(text: str) -> list[int]:
        return [
            3 + zlib.crc32(word.encode()) % (vocabulary - 3) for word in text.split()
        ]

    return encode


def traffic(name: str, vocabulary: int, **sizes: Any) -> tuple[list[Json], int, float]:
    """Return a workload's requests, its longest path and its pressure."""
    from vllm_radix_bench.workloads.sizing import build
    from vllm_radix_bench.workloads.turn import longest_path

    made = build(name, encode_with(vocabulary), **sizes)
    return requests_of(made.roots), longest_path(made.roots), made.pressure


def model_folder(
    path: Path,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head: int,
    inner: int,
    vocabulary: int,
    seed: int | None = None,
    scale: float = 0.06,
    dtype: str = "bfloat16",
) -> str:
    """Write a Llama's config; with a seed, random weights too.

    Args:
        path: folder to write.
        layers: of the model.
        hidden: its width.
        heads: query heads.
        kv_heads: key and value heads.
        head: elements of each.
        inner: width of the gated layer.
        vocabulary: tokens.
        seed: of the weights; None writes none.
        scale: standard deviation of the weights.
        dtype: of the weights.

    Returns:
        The folder's name.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    }
    (path / "config.json").write_text(json.dumps(config, indent=1))
    if seed is None:
        return str(path)
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = scale, mean: float = 0.0) -> torch.Tensor:
        made = torch.randn(*shape, generator=generator) * std + mean
        return made.to(getattr(torch, dtype))

    weights = {
        "model.embed_tokens.weight": normal(vocabulary, hidden, std=1.0),
        "lm_head.weight": normal(vocabulary, hidden),
        "model.norm.weight": normal(hidden, mean=1.0),
    }
    for layer in range(layers):
        sizes = {
            # Twice as wide: attention is to prefer some keys to others.
            "self_attn.q_proj": ((heads * head, hidden), 2 * scale),
            "self_attn.k_proj": ((kv_heads * head, hidden), 2 * scale),
            "self_attn.v_proj": ((kv_heads * head, hidden), scale),
            "self_attn.o_proj": ((hidden, heads * head), scale),
            "mlp.gate_proj": ((inner, hidden), scale),
            "mlp.up_proj": ((inner, hidden), scale),
            "mlp.down_proj": ((hidden, inner), scale),
        }
        for name, (shape, std) in sizes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = normal(*shape, std=std)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = normal(hidden, mean=1.0)
    save_file(weights, str(path / "model.safetensors"), metadata={"format": "pt"})
    return str(path)


def compare(stock: Json, other: Json, requests: list[Json]) -> Json:
    """Compare answers, each where both were asked the same.

    A greedy answer may differ where the model is undecided: where its two likeliest
    tokens are within ``GAP``, by the stock arm's log-probabilities. What comes after
    such an answer was asked something else, and is left out.

    Returns:
        ``compared`` and ``ties``, the ids of answers that are ``wrong``, and of each
        difference its ``id``, its first ``token`` and the ``gap`` there; None where
        one answer is missing or the stock arm has no log-probabilities.
    """
    out: Json = {"compared": 0, "ties": 0, "wrong": [], "differences": []}
    lost = {r["id"] for r in requests if "abort_after" in r}
    left = list(requests)
    while left:
        known = {r["id"] for r in left}
        ready = [r for r in left if r.get("after") not in known]
        left = [r for r in left if r.get("after") in known]
        for request in ready:
            name = request["id"]
            if name in lost or request.get("after") in lost:
                lost.add(name)
                continue
            theirs, ours = stock.get(name), other.get(name)
            if theirs is None and ours is None:
                # Both were cut short before it.
                continue
            if theirs is None or ours is None:
                out["wrong"].append(name)
                out["differences"].append({"id": name, "token": None, "gap": None})
                lost.add(name)
                continue
            pairs = zip(theirs["outputs"], ours["outputs"], strict=True)
            for one, two in pairs:
                out["compared"] += 1
                if one["tokens"] == two["tokens"]:
                    continue
                lost.add(name)
                token, gap = parting(one, two)
                out["differences"].append({"id": name, "token": token, "gap": gap})
                if gap is not None and gap <= GAP:
                    out["ties"] += 1
                else:
                    out["wrong"].append(name)
    return out


def parting(one: Json, two: Json) -> tuple[int, float | None]:
    """Return the first token at which two answers differ, and the first's gap there."""
    pairs = itertools.zip_longest(one["tokens"], two["tokens"])
    first = [a == b for a, b in pairs].index(False)
    if first >= len(one["top"]):
        return first, None
    best, second = one["top"][first]
    return first, float(best - second)


def start(
    wanted: dict[str, Json],
    seconds: float,
    logs: Path,
    environment: dict[str, str] | None = None,
) -> tuple[dict[str, Arm], dict[str, str]]:
    """Start arms at once; return those that came up, and why others did not."""
    arms = {
        name: Arm(name, settings, logs, environment)
        for name, settings in wanted.items()
    }
    up, down = {}, {}
    end = time.monotonic() + seconds
    for name, arm in arms.items():
        try:
            arm.wait(max(5.0, end - time.monotonic()))
            up[name] = arm
        except ArmError as error:
            arm.stop()
            down[name] = str(error)
    return up, down
