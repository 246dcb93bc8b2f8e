"""How much of a prompt all cache salts share, and what their keys have in common."""

import re
import time

import pytest
from engine.test_request_keys import image, request
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from support.engine_double import EngineDouble, make_scheduler, make_vllm_config
from support.prompts import prompt
from vllm_radix.config import RadixConfig
from vllm_radix.engine import public_prefixes
from vllm_radix.engine.public_prefixes import (
    Declared,
    First,
    UpTo,
    make_public_prefixes,
)
from vllm_radix.engine.request_keys import RequestKeys
from vllm_radix.engine.support import public_prefix_problem
from vllm_radix.tree import decode, encode

SIZE = 4
PUBLIC = list(range(10, 20))  # two blocks and a half


@pytest.fixture
def keys():
    keys = RequestKeys(SIZE)
    keys.public = Declared([PUBLIC])
    return keys


# -- how much is public ----------------------------------------------------------------


def test_the_longest_declared_sequence_counts_and_only_as_a_whole():
    declared = Declared([[1, 2], [1, 2, 3, 4], [9]])
    lengths = [declared.length(p) for p in ([1, 2, 3, 4, 5], [1, 2, 3], [1], [9, 1])]
    assert lengths == [4, 2, 0, 1]


def test_first_tokens_are_public_of_prompts_that_have_them():
    assert [First(3).length(range(n)) for n in (2, 3, 9)] == [0, 3, 3]


def test_a_prompt_is_public_up_to_the_first_marker_within_the_bound():
    up_to = UpTo([7, 8], within=5)
    prompts = [1, 7, 8, 7, 8], [7, 7, 8, 1], [1, 2, 3, 7, 8], [1, 2, 3, 4, 7, 8], [7]
    assert [up_to.length(p) for p in prompts] == [3, 3, 5, 0, 0]


def test_a_marker_is_looked_for_in_one_go():
    """Also in a prompt that is made to take long: the engine waits meanwhile."""
    looked = 0

    class Counted(list):
        def __eq__(self, other):
            nonlocal looked
            looked += 1
            return super().__eq__(other)

        __hash__ = None

    up_to = UpTo([7, 8], within=1 << 16)
    up_to._marker = Counted([7, 8])
    began = time.process_time()
    assert up_to.length([7] * (1 << 16)) == 0
    assert looked == 1 << 16
    # Half a minute where the rest is copied each time.
    assert time.process_time() - began < 2


@pytest.mark.parametrize("marker", [[], [1, 2, 3]])
def test_a_marker_that_nothing_can_hold_is_refused(marker, monkeypatch):
    monkeypatch.setattr(
        public_prefixes._Tokenizer, "encode", lambda *args, **kwargs: marker
    )
    config = RadixConfig(public_prefix={"marker": "x", "within": 2})
    message = f"'marker' 'x' has {len(marker)} tokens; allowed: 1 to 'within'"
    with pytest.raises(ValueError, match=message):
        make_public_prefixes(config, make_vllm_config().model_config)


def test_what_is_remembered_of_a_client_is_bounded(keys):
    long = "s" * 100_000
    one, two = (request([*PUBLIC, 1, 2], cache_salt=long + end) for end in "ab")
    again = request([*PUBLIC, 1, 2], cache_salt=long + "a")
    assert keys.key(one, 12) == keys.key(again, 12)
    assert keys.key(one, 12) != keys.key(two, 12)
    assert max(len(salt) for salt, _ in keys._salts._numbers) <= 64


# -- keys ------------------------------------------------------------------------------


def test_salts_share_whole_public_blocks_and_nothing_after_them(keys):
    tokens = [*PUBLIC, 1, 2, 3, 4, 5, 6]
    a, b, none = (request(tokens, cache_salt=salt) for salt in ("a", "b", None))
    assert keys.num_public(a) == 8
    assert len({keys.namespace(r) for r in (a, b, none)}) == 1
    texts = [decode(keys.key(r, 16)) for r in (a, b, none)]
    for text in texts:
        assert text[:8] == PUBLIC[:8] and text[8] < -1 and text[9:] == tokens[9:]
    assert len({text[8] for text in texts}) == 3
    again = request(tokens, cache_salt="a")
    assert keys.key(again, 16) == keys.key(a, 16)


def test_a_key_is_the_same_however_it_is_read(keys):
    """Whole, grown token by token, as a tail, and in parts."""
    tokens = [*PUBLIC, 1, 2, 3, 4, 5, 6, 7]
    whole = decode(keys.key(request(tokens, cache_salt="a"), 17))
    grown = request(tokens[:11], cache_salt="a")
    for at in range(11, 18):
        assert decode(keys.key(grown, at))[:at] == whole[:at]
        grown.append_output_token_ids([*tokens, 0][at])
    for start in range(17):
        for end in range(start, 17):
            part = keys.part(request(tokens, cache_salt="a"), start, end)
            assert decode(part) == whole[start:end]
    assert keys.without_salt(grown, encode(whole)) == encode(tokens)


def test_other_prompts_stay_in_the_namespace_of_their_salt(keys):
    for tokens in (PUBLIC[:9], [*PUBLIC[:9], 1, 2, 3], [*PUBLIC[1:], 1, 2, 3]):
        other = request(tokens, cache_salt="a")
        assert keys.namespace(other) == ("salt", "a") and not keys.num_public(other)
        assert decode(keys.key(other, 8))[:8] == tokens[:8]
    session = request([*PUBLIC, 1, 2], cache_salt="a", resumable=True)
    assert keys.namespace(session) == ("salt", "a")
    keys.public = Declared([PUBLIC[:3]])
    assert not keys.num_public(request([*PUBLIC], cache_salt="a")), "less than a block"


def test_the_last_token_of_a_prompt_is_never_public(keys):
    keys.public = Declared([PUBLIC[:8]])
    assert keys.num_public(request(PUBLIC[:8], cache_salt="a")) == 4
    assert keys.num_public(request(PUBLIC[:9], cache_salt="a")) == 8


def test_adapters_stay_apart(keys):
    one = request([*PUBLIC, 1], cache_salt="a", lora_request=LoRARequest("x", 1, "/x"))
    two = request([*PUBLIC, 1], cache_salt="b", lora_request=LoRARequest("x", 1, "/x"))
    other = request(
        [*PUBLIC, 1], cache_salt="a", lora_request=LoRARequest("y", 2, "/y")
    )
    plain = request([*PUBLIC, 1], cache_salt="a")
    assert keys.namespace(one) == keys.namespace(two)
    assert len({keys.namespace(r) for r in (one, other, plain)}) == 3
    assert keys.owner(one) != keys.owner(two)


def test_media_are_never_public(keys):
    def shown(salt, offset, cat="cat"):
        tokens = [*PUBLIC, 1, 2, 3, 4, 5, 6]
        media = [image(cat, offset, 2)]
        return request(tokens, cache_salt=salt, mm_features=media)

    assert keys.num_public(shown("a", 12)) == 8
    assert keys.num_public(shown("a", 5)) == 4
    assert keys.namespace(shown("a", 2)) == ("salt", "a")
    for offset in (5, 8, 9, 12):
        a, b = (decode(keys.key(shown(salt, offset), 16)) for salt in "ab")
        public = keys.num_public(shown("a", offset))
        assert a[:public] == b[:public] == PUBLIC[:public]
        following = slice(public, public + 2)
        assert a[following] != b[following], "the next block tells the salts apart"
        assert decode(keys.key(shown("a", offset), 16)) == a
    plain = decode(keys.key(request([*PUBLIC, 1, 2], cache_salt="a"), 12))
    assert plain[8] != decode(keys.key(shown("a", 8), 12))[8]


def test_each_token_is_a_block_of_its_own_where_the_tree_counts_tokens():
    keys = RequestKeys(1)
    keys.public = Declared([PUBLIC])
    a, b = (request([*PUBLIC, 5, 6], cache_salt=salt) for salt in "ab")
    assert keys.num_public(a) == 10
    one, two = decode(keys.key(a, 12)), decode(keys.key(b, 12))
    assert one[:10] == two[:10] == PUBLIC and one[10] != two[10] and one[11:] == [6]
    shown = request(
        [*PUBLIC, 5, 6],
        cache_salt="a",
        mm_features=[
            MultiModalFeatureSpec(
                data=None,
                modality="image",
                identifier="cat",
                mm_position=PlaceholderRange(offset=10, length=1),
            )
        ],
    )
    assert decode(keys.key(shown, 12))[10] not in (one[10], two[10])


def test_nothing_is_shared_once_all_markers_are_given(keys):
    keys._salts._next = 1 << 30
    late = request([*PUBLIC, 1], cache_salt="late")
    assert keys.namespace(late) == ("salt", "late")
    assert decode(keys.key(late, 8)) == PUBLIC[:8]


# -- the option ------------------------------------------------------------------------


def test_texts_need_a_tokenizer():
    config = make_vllm_config().model_config
    for option in ({"prompts": ["x"]}, {"marker": "x", "within": 5}):
        with pytest.raises(
            ValueError, match="--skip-tokenizer-init is given: write tok"
        ):
            make_public_prefixes(RadixConfig(public_prefix=option), config)
    made = make_public_prefixes(
        RadixConfig(public_prefix={"prompts": [[1, 2]]}), config
    )
    assert made.length([1, 2, 3]) == 2
    made = make_public_prefixes(RadixConfig(public_prefix={"first_tokens": 2}), config)
    assert made.length([5, 6, 7]) == 2
    option = {"marker": [6], "within": 3}
    made = make_public_prefixes(RadixConfig(public_prefix=option), config)
    assert made.length([5, 6, 7]) == 2


class Configured:
    """Stands for vLLM's configuration with a model that has a chat template."""

    def __init__(self, folder):
        from vllm.config import ModelConfig

        self.model_config = ModelConfig(model=folder, tokenizer=folder)


def test_texts_and_chats_are_public_as_far_as_nothing_changes_them(smollm2):
    vllm_config = Configured(smollm2)
    system = [{"role": "system", "content": "You are a weather service. Be short."}]
    text = "Answer with one word only"
    option = {"prompts": [system, text]}
    made = make_public_prefixes(
        RadixConfig(public_prefix=option), vllm_config.model_config
    )
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    for question in ("Rain?", " and", "\nSun", "123"):
        chat = [*system, {"role": "user", "content": question}]
        written = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(written, add_special_tokens=False)
        shared = tokenizer.decode(ids[: made.length(ids)])
        assert "Be short." in shared and question not in shared
        assert shared.endswith("<|im_start|>user")
        ids = tokenizer.encode(text + question)
        assert text.startswith(tokenizer.decode(ids[: made.length(ids)]))
    ids = tokenizer.encode(f"{text}: Rain?")
    assert tokenizer.decode(ids[: made.length(ids)]) == text
    option = {"marker": "<|im_end|>", "within": 99}
    made = make_public_prefixes(
        RadixConfig(public_prefix=option), vllm_config.model_config
    )
    ids = tokenizer.encode(written, add_special_tokens=False)
    assert tokenizer.decode(ids[: made.length(ids)]).endswith("Be short.<|im_end|>")


def test_a_template_that_refuses_a_prompt_says_so(smollm2, monkeypatch):
    from vllm_radix.engine import public_prefixes

    class Refuses:
        def apply_chat_template(self, *args, **kwargs):
            raise RuntimeError("System role not supported")

    monkeypatch.setattr(
        public_prefixes, "cached_tokenizer_from_config", lambda config: Refuses()
    )
    option = {"prompts": [[{"role": "system", "content": "x"}]]}
    with pytest.raises(
        ValueError, match=r"\(System role not supported\): write the tok"
    ):
        make_public_prefixes(RadixConfig(public_prefix=option), Configured(smollm2))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "a KV connector",
        ),
        (
            {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}},
            "KV cache events",
        ),
    ],
)
def test_what_reads_hashes_is_refused(options, reason):
    radix = {"public_prefix": {"first_tokens": 8}}
    with pytest.raises(
        ValueError, match=f"does not go with {reason}, which know blocks"
    ):
        make_vllm_config(
            radix=radix, scheduler_cls="vllm_radix.RadixScheduler", **options
        )
    config = make_vllm_config(radix=radix, **options)
    assert public_prefix_problem(config, RadixConfig()) is None


# -- through the scheduler -------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            {"prompts": [[1, 2], [3, 4, 5]]},
            "what begins with a declared prompt, of 3, 2",
        ),
        ({"first_tokens": 9}, "the first 9 tokens, which tells what others ask"),
        (
            {"marker": [7], "within": 5},
            r"what comes up to tokens \[7\] within 5, which",
        ),
    ],
)
def test_the_log_says_what_is_shared(option, said, caplog):
    with caplog.at_level("INFO", logger="vllm.radix"):
        make_scheduler(radix={"public_prefix": option})
    assert re.search(f"All cache salts share {said}", caplog.text)


def engine(public, size=SIZE, blocks=60, lag=0, **radix):
    made = make_scheduler(
        block_size=size,
        num_blocks=blocks,
        asynchronous=bool(lag),
        radix={"public_prefix": {"prompts": public}, **radix},
    )
    return EngineDouble(made, lag, public=public)


def serve(one, name, tokens, salt, **fields):
    one.add(name, tokens, cache_salt=salt, **fields)
    one.run()
    return tokens + one.outputs[name]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("size", [1, 4, 16, 32])
def test_another_salt_finds_the_public_blocks_and_no_more(size, lag):
    public = prompt("system", 70)
    one = engine([public], size, blocks=300 // size + 10, lag=lag)
    said = serve(one, "a", public + prompt("a", 30), "a")
    serve(one, "b", public + prompt("a", 30), "b")
    serve(one, "none", public + prompt("a", 30), None)
    serve(one, "a again", said, "a")
    serve(one, "other", public[:-1] + prompt("a", 30), "b")
    whole = 70 // size * size
    assert (one.cached["b"], one.cached["none"], one.cached["other"]) == (
        whole,
        whole,
        0,
    )
    assert one.cached["a again"] == len(said) - 1


def test_prompt_logprobs_read_nothing_of_it():
    public = prompt("system", 40)
    one = engine([public])
    serve(one, "a", public + [5] * 9, "a")
    serve(one, "b", public + [6] * 9, "b", prompt_logprobs=1)
    serve(one, "c", public + [7] * 9, "c")
    assert (one.cached["b"], one.cached["c"]) == (0, 40)


def test_a_burst_of_tenants_computes_the_public_prefix_once():
    public = prompt("system", 64)
    made = make_scheduler(
        block_size=SIZE,
        num_blocks=200,
        max_num_seqs=8,
        max_num_batched_tokens=32,
        radix={"public_prefix": {"prompts": [public]}},
    )
    one = EngineDouble(made, public=[public])
    for salt in "abcdef":
        one.add(salt, public + prompt(salt, 10), cache_salt=salt)
    one.run()
    assert sorted(one.cached.values()) == [0, *[64] * 5]


def test_an_ended_session_lets_go_of_nothing_public():
    public = prompt("system", 16)
    one = engine([public], blocks=25)
    hints = {"radix_end_session": True}
    serve(one, "a", public + prompt("a", 12), "a", extra_args=hints)
    serve(one, "x", prompt("x", 52), "x")
    serve(one, "b", public + prompt("b", 4), "b")
    assert one.cached["b"] == 16


def test_a_reply_is_replaced_by_its_own_salt_alone():
    """With a field of the body as the tenant, the salt still keeps branches apart."""

    def left(salt):
        public = prompt("system", 16)
        one = engine([public], blocks=30, tenant="user")
        mine = {"user": "u"}
        serve(one, "old", prompt("old", 12), "x")
        said = serve(one, "chatcmpl-1", public + prompt("a", 12), "a", extra_args=mine)
        hints = {**mine, "radix_replaces": "chatcmpl-1"}
        serve(one, "next", public + prompt("b", 12), salt, extra_args=hints)
        serve(one, "x", prompt("x", 70), "x")
        serve(one, "again", said, "a", extra_args=mine)
        return one.cached["again"]

    assert left("a") < left("b") == 28


def test_a_reset_forgets_what_is_public_too():
    public = prompt("system", 16)
    one = engine([public])
    serve(one, "a", public + [5] * 9, "a")
    assert one.scheduler.reset_prefix_cache()
    serve(one, "b", public + [5] * 9, "b")
    serve(one, "c", public + [5] * 9, "c")
    assert (one.cached["b"], one.cached["c"]) == (0, 16)
