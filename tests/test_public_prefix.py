"""The option ``public_prefix``: what is read, and what is refused with which words."""

import json
from pathlib import Path

import pytest

from support.pages import ROOT
from vllm_radix.config import RadixConfig
from vllm_radix.engine.public_prefixes import make_public_prefixes
from vllm_radix.public_prefix import read_public_prefix


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, r'7 is not one of the path of a JSON file of prompts, {"prompts": \['),
        ({}, "{} is not one of the path"),
        ({"first": 3}, "is not one of the path"),
        ({"first_tokens": 3, "within": 4}, "is not one of the path"),
        ({"first_tokens": 0}, "'first_tokens': 0 is not a whole number of at least 1"),
        ({"first_tokens": True}, "'first_tokens': True is not a whole number"),
        ({"marker": "", "within": 4}, "'marker': '' is not a text or a list"),
        ({"marker": [1, -1], "within": 4}, r"'marker': \[1, -1\] is not a text"),
        ({"marker": "x", "within": "4"}, "'within': '4' is not a whole number"),
        ({"prompts": []}, r"'prompts': \[\] is not a list of one prompt"),
        ({"prompts": ["x", ""]}, "prompt 2 of 'prompts': '' is not a text"),
        ({"prompts": [[1.5]]}, r"prompt 1 of 'prompts': \[1.5\] is not a text"),
        ({"prompts": [{"messages": []}]}, "prompt 1 of 'prompts': {"),
        ({"prompts": [[{"content": "x"}]]}, "prompt 1 of 'prompts': {"),
        ({"prompts": [{"messages": [{"role": "system"}], "tools": 3}]}, "prompt 1"),
        ({"prompts": [{"messages": [{"role": "system"}], "more": 3}]}, "prompt 1"),
        ({"prompts": ["a\ud800"]}, "'prompts' has half a pair of surrogates"),
        ("/no/such/file.json", "'/no/such/file.json' cannot be read: No such file"),
        ("a\0b", r"'a\\x00b' cannot be read: embedded null"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(value, message):
    with pytest.raises(ValueError, match=f"radix option 'public_prefix': .*{message}"):
        RadixConfig(public_prefix=value)


def test_a_file_of_prompts_is_read_and_its_mistakes_are_named(tmp_path):
    file = tmp_path / "public.json"
    file.write_text(json.dumps([[1, 2], "text"]))
    assert RadixConfig(public_prefix=str(file))
    assert read_public_prefix(str(file)).prompts == [[1, 2], "text"]
    for text, message in (
        ("[", "is not JSON"),
        ('{"a": 1}', "public.json': {'a': 1} is not a list of one prompt"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            RadixConfig(public_prefix=str(file))


LONG = "secret " * 20_000


@pytest.mark.parametrize(
    "value", [LONG, {"prompts": LONG}, {"prompts": [[{"content": LONG}]]}, [LONG]]
)
def test_a_message_shows_the_beginning_of_a_long_value_only(value):
    with pytest.raises(ValueError, match="radix option 'public_prefix'") as caught:
        RadixConfig(public_prefix=value)
    assert len(str(caught.value)) < 450
    assert str(caught.value).count("secret") < 15


def test_a_file_is_read_once_until_it_is_changed(tmp_path, monkeypatch):
    file = tmp_path / "public.json"
    file.write_text("[[1, 2]]")
    reads = []
    read_text = Path.read_text

    def counted(self, **options):
        reads.extend([self] * (self == file))
        return read_text(self, **options)

    monkeypatch.setattr(Path, "read_text", counted)
    config = RadixConfig(public_prefix=str(file))
    assert RadixConfig.resolve(config.to_dict()).public == config.public
    assert make_public_prefixes(config, None).length([1, 2, 3]) == 2
    assert reads == [file]
    file.write_text("[[1, 2, 3]]")
    assert RadixConfig(public_prefix=str(file)).public.prompts == [[1, 2, 3]]
    assert config.public.prompts == [[1, 2]], "what was checked is what is used"


def test_the_example_is_on_its_page_and_right():
    example = ROOT / "examples" / "public_prefix.json"
    page = (ROOT / "docs" / "tenants.md").read_text()
    assert f"```json\n{example.read_text()}```" in page
    kinds = [type(one).__name__ for one in read_public_prefix(str(example)).prompts]
    assert kinds == ["ChatPrompt", "ChatPrompt", "str", "list"]
