"""What a request's blocks are keyed by."""

import weakref

import pytest
import torch
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.request import Request

from support.engine_double import make_vllm_config  # noqa: F401  (sets vLLM up)
from vllm_radix.engine.request_keys import ContentIds, RequestKeys
from vllm_radix.tree import decode, encode

SIZE = 4


def request(tokens, **fields):
    sampling = SamplingParams(max_tokens=4)
    return Request("r", tokens, sampling, None, **fields)


def image(name, offset, length):
    return MultiModalFeatureSpec(
        data=None,
        modality="image",
        identifier=name,
        mm_position=PlaceholderRange(offset=offset, length=length),
    )


@pytest.fixture
def keys():
    return RequestKeys(SIZE)


def test_a_key_is_the_tokens_in_whole_blocks(keys):
    assert keys.key(request(list(range(10))), 8) == encode(range(8))


def test_a_key_grows_with_the_request(keys):
    grown = request(list(range(6)))
    assert keys.key(grown, 4) == encode(range(4))
    assert keys.key(grown, 5) == encode(range(5))
    grown.append_output_token_ids([6, 7, 8])
    assert keys.key(grown, 8) == encode(range(8))
    assert keys.key(grown, 9) == encode(range(9))
    assert keys.key(grown, 3) == encode(range(8))
    with pytest.raises(ValueError, match="has 9 tokens, not 10"):
        keys.key(grown, 10)


def test_what_is_not_plain_has_no_key_inside_a_block(keys):
    pictured = request([9] * 10, mm_features=[image("cat", 0, 3)])
    assert len(keys.key(pictured, 10)) == 8 * 4
    assert len(keys.key(request(list(range(10)), resumable=True), 10)) == 8 * 4


def test_a_streaming_session_is_read_anew(keys):
    session = request(list(range(8)), resumable=True)
    assert keys.key(session, 8) == encode(range(8))
    session._all_token_ids[4:] = [9, 9, 9, 9]
    assert keys.key(session, 8) == encode([0, 1, 2, 3, 9, 9, 9, 9])


def test_a_key_is_made_once_and_goes_with_its_request(keys):
    kept = request(list(range(8)))
    assert keys.key(kept, 8) is keys.key(kept, 8)
    gone = weakref.ref(kept)
    del kept
    assert gone() is None


def test_namespaces_are_adapter_and_salt(keys):
    tokens = list(range(8))
    spaces = {
        keys.namespace(request(tokens, **fields))
        for fields in (
            {},
            {"cache_salt": "a"},
            {"cache_salt": "b"},
            {"lora_request": LoRARequest("a", 1, "/x")},
            {"lora_request": LoRARequest("a", 1, "/y")},
            {"lora_request": LoRARequest("a", 1, "/x"), "cache_salt": "a"},
        )
    }
    assert len(spaces) == 6
    assert None in spaces


def test_pictures_tell_blocks_of_equal_tokens_apart(keys):
    tokens = [1, 2, 3, 4, *[9] * 8, 5, 6, 7, 8]

    def key(*pictures):
        return keys.key(request(tokens, mm_features=list(pictures)), 16)

    cat, again = key(image("cat", 4, 8)), key(image("cat", 4, 8))
    dog, moved = key(image("dog", 4, 8)), key(image("cat", 5, 7))
    assert cat == again
    assert len({cat, dog, moved, encode(tokens)}) == 4
    # Only blocks that hold a picture are marked: the text before is shared.
    assert cat[: 4 * SIZE] == encode(tokens[:4]) == dog[: 4 * SIZE]
    assert cat[-4 * SIZE :] == encode(tokens[-4:])
    assert decode(cat)[4] < 0


def test_where_a_block_is_a_token_a_medium_is_marked_once():
    """Numbers are 31 bits there, and a picture may be a thousand tokens."""
    keys = RequestKeys(1)
    tokens = [1, 2, 9, 9, 9, 3, 9, 9, 4]

    def key(*pictures):
        media = [image(*picture) for picture in pictures]
        return keys.key(request(tokens, mm_features=media), len(tokens))

    cat = key(("cat", 2, 3), ("dog", 6, 2))
    assert cat == key(("cat", 2, 3), ("dog", 6, 2))
    assert keys.markers._next == 2
    at = decode(cat)
    assert [token < 0 for token in at] == [at in (2, 6) for at in range(9)]
    others = [
        key(("dog", 2, 3), ("dog", 6, 2)),
        key(("cat", 2, 3), ("cat", 6, 2)),
        key(("cat", 3, 2), ("dog", 6, 2)),
        key(("cat", 2, 3)),
        encode(tokens),
    ]
    assert len({cat, *others}) == 6


def test_embeddings_tell_prompts_apart(keys):
    def key(value):
        embeds = torch.full((8, 2), value)
        return keys.key(request(None, prompt_embeds=embeds), 8)

    assert key(1.0) == key(1.0) != key(2.0)


def test_markers_are_exact_and_never_given_twice():
    markers = ContentIds(capacity=2)
    first = markers.number("a")
    assert markers.number("b") != first == markers.number("a")
    markers.number("c")  # forgets b, the oldest
    given = {markers.number(content) for content in "abc"}
    assert len(given) == 3
    assert min(given) >= 0


def test_markers_beyond_two_billion_still_fit_a_key(keys):
    keys.markers._next = 2**31 - 1
    tokens = [[9] * 4, [9] * 4]
    for number, block in enumerate(tokens):
        high, low = divmod(keys.markers.number(("content", number)), 2**31)
        block[:2] = [-1 - high, low]
    assert tokens == [[-1, 2**31 - 1, 9, 9], [-2, 0, 9, 9]]
    assert encode(tokens[0]) != encode(tokens[1])
