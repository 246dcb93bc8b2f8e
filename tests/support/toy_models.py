"""Toy models of kinds that mix layers, with weights that matter.

A folder holds a configuration and a tokenizer; weights are made when an engine loads
it, the same ones in each. vLLM's own dummy weights lie within 0.001: with them no
layer has a say, and a wrong block would not show.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from support import cpu_states
from support.toy_configs import COMMON, HYBRID_TOYS, TOYS

__all__ = ["HYBRID_TOYS", "TOYS", "make_toy", "prepare_engine"]


def make_toy(name, folder, tokenizer):
    """Write a toy's folder; return its path.

    Args:
        name: of ``HYBRID_TOYS``.
        folder: where to write it.
        tokenizer: a model's folder whose tokenizer it gets.
    """
    kind, architecture, sizes = HYBRID_TOYS[name]
    config = getattr(transformers, kind)(**{**COMMON, **sizes})
    config.architectures = [architecture]
    config.dtype = "float32"
    folder = Path(folder) / name
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tokenizer) / file, folder)
    return str(folder)


def prepare_engine():
    """Prepare vLLM in this process for the engine of a toy."""
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
    from vllm.model_executor.models import registry

    # Before the CPU packs them: afterwards it would be too late.
    DummyModelLoader.load_weights = lambda loader, model, config: fill(model)
    # It asks what a class can do in a process of its own, once per machine.
    registry._run_in_subprocess = lambda ask: ask()
    spec_of = MambaMixer2.get_kv_cache_spec

    def without_checkpoints(layer, config):
        # vLLM 0.32's kernel for the CPU returns no states from inside a chunk,
        # and the layer ends in an IndexError when it looks for one.
        return replace(
            spec_of(layer, config),
            num_prefill_checkpoint_blocks=0,
            prefill_checkpoint_alignment=None,
        )

    MambaMixer2.get_kv_cache_spec = without_checkpoints
    cpu_states.install()


def fill(model):
    """Fill a model's parameters at random, the same way each time."""
    random = torch.Generator().manual_seed(0)
    for name, weights in model.named_parameters():
        if not weights.is_floating_point():
            continue
        values = torch.randn(weights.shape, generator=random)
        if "A_log" in name or name.endswith(".A"):
            # Decays so slowly that a state remembers some hundred tokens.
            rate = torch.rand(weights.shape, generator=random) * 0.02 + 0.002
            values = torch.log(rate) if "A_log" in name else -rate
        elif "dt_bias" in name:
            values = torch.rand(weights.shape, generator=random) - 0.5
        elif weights.dim() == 1:
            values = torch.ones_like(values) if "norm" in name else values * 0.02
        elif "embed" in name:
            values *= 0.02  # the layers decide, not the last token
        else:
            values *= weights.shape[-1] ** -0.5
        if "qkv" in name or "q_proj" in name or "k_proj" in name:
            values *= 2.5  # few keys get most of the attention
        with torch.no_grad():
            weights.copy_(values.to(weights.dtype))
