"""From text to tokens: what counts as one without a tokenizer, and what is refused."""

import re
from zlib import crc32

import pytest

from vllm_radix_bench.workloads.encoders import words


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
