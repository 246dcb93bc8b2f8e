"""From text to tokens: what counts as one without a tokenizer, and what is refused."""

import re
from zlib import crc32

import pytest

from vllm_radix.cli import main
from vllm_radix_bench.workloads.encoders import TokenizerError, load_encode, words


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("哪些房间开着?", 7),
        ("どの部屋が開いてる", 9),
        ("ห้องไหน", 7),
        ("use 向量 x2", 4),
        ("GPU显存v2", 4),
        ("어느 방이", 2),
    ],
)
def test_scripts_without_spaces_have_a_token_for_each_character(text, count):
    assert len(words(text)) == count
    assert words(text)[: count - 1] == words(text[:-1])[: count - 1]


def test_texts_with_spaces_have_a_token_for_each_word_and_mark():
    text = "Which rooms_are open, at 10:30? Größe, naïve; слово άλφα"
    parts = re.findall(r"\w+|[^\w\s]", text)
    assert words(text) == [crc32(part.encode()) >> 2 for part in parts]


@pytest.mark.parametrize("text", ["{", "[]", '{"version": "1.0"}'])
def test_a_broken_tokenizer_names_its_folder(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError) as raised:
        load_encode(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: no tokenizer to load (")


def test_no_tokenizer_is_told_in_one_line(tmp_path, capsys):
    empty, file, missing = (tmp_path / name for name in ("empty", "file", "missing"))
    empty.mkdir()
    file.touch()
    for given, said in (
        (missing, f"{missing}: no such folder, and not found on the hub"),
        ("nothere", "nothere: no such folder, and not found on the hub"),
        (file, f"{file}: is a file, not a model folder"),
        (empty, f"{empty}: no tokenizer to load ("),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["replay", "--workload", "chat", "--tokenizer", str(given)])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"vllm-radix replay: {said}")
