"""A Llama of one layer with random weights, and a tokenizer of letters.

Random weights of some size: the model is seldom undecided, and reads its whole
context. End-of-sequence is likelier than other tokens, so that answers end by it.
"""

from pathlib import Path

import arms

VOCABULARY = 512
EOS = 2
_LETTERS = [chr(code) for code in range(32, 127)]
SIZES = {
    "layers": 1,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 1,
    "head": 32,
    "inner": 64,
    "vocabulary": VOCABULARY,
    "dtype": "float32",
}


def text_of(tokens: list[int]) -> str:
    """Return the text of tokens; what is no letter is '?'."""
    letters = dict(enumerate(_LETTERS, start=3))
    return "".join(letters.get(token, "?") for token in tokens)


def make_model(folder: Path) -> str:
    """Write the model and its tokenizer; return the folder's name."""
    from safetensors.torch import load_file, save_file

    arms.model_folder(folder, seed=1, scale=0.2, **SIZES)
    path = str(folder / "model.safetensors")
    weights = load_file(path)
    weights["lm_head.weight"][EOS] *= 3
    save_file(weights, path, metadata={"format": "pt"})
    _write_tokenizer(folder)
    return str(folder)


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *_LETTERS]
    # Tokens that no grammar of letters allows.
    words += [f"<{number}>" for number in range(len(words), VOCABULARY)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)
