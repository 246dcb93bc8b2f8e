"""Requests of traces, as a real model can be sent them."""

from vllm_radix_bench.ab import loads


def test_a_recorded_trace_becomes_tokens_of_the_model():
    """Whatever their numbers, unrelated requests stay unrelated."""
    from vllm_radix_bench.replay.oracles import infinite_cache
    from vllm_radix_bench.traces.formats.recorded import RecordedTokens
    from vllm_radix_bench.workloads.turn import Turn

    roots = [Turn(RecordedTokens([(0, i)], 0, 100), 3) for i in range(300)]
    shared = RecordedTokens([(0, 7), (60, 301)], 0, 100)
    roots.append(Turn(shared, 3))
    made = loads.in_vocabulary(roots, 512)
    assert made[-1].tokens[:60] == made[7].tokens[:60]
    assert made[-1].tokens[60:] != made[7].tokens[60:]
    fewest = infinite_cache(made)
    wanted = infinite_cache(roots)
    assert wanted == 300 * 100 + 40
    # First tokens are equal now and then, and hardly ever more.
    assert wanted - 700 < fewest <= wanted
    assert all(0 <= t < 512 for turn in made for t in turn.tokens)


def test_a_hashed_trace_becomes_tokens_of_the_model():
    from vllm_radix_bench.traces.hashed_prompt import HashedPrompt
    from vllm_radix_bench.workloads.turn import Turn

    one = Turn(HashedPrompt([5, 6, 7], 40, 16), 3)
    two = Turn(HashedPrompt([5, 6, 9], 48, 16), 3, children=[Turn([1, 2], 1)])
    three = Turn([3, 70_000, 70_000], 2)
    first, second, third = loads.in_vocabulary([one, two, three], 5000)
    assert len(first.tokens) == 40 and len(second.tokens) == 48
    assert first.tokens[:32] == second.tokens[:32]
    assert first.tokens[32:40] != second.tokens[32:40]
    assert all(0 <= token < 5000 for t in (first, second, third) for token in t.tokens)
    assert third.tokens[0] == 3 and third.tokens[1] == third.tokens[2]
    assert second.children[0].tokens == [1, 2]


def test_tenant_and_hints_go_along_with_a_request():
    from types import SimpleNamespace

    from vllm_radix_bench.ab.client import Client, Sending
    from vllm_radix_bench.workloads.turn import Turn

    client = Client(SimpleNamespace(model_name="m"), Sending(tenant_field="user"))
    hints = {"radix_end_session": True}
    said = [
        client._body(turn, [1]).get("vllm_xargs")
        for turn in (
            Turn([1], 1),
            Turn([1], 1, tenant="t"),
            Turn([1], 1, tenant="t", hints=hints),
            Turn([1], 1, hints=hints),
        )
    ]
    assert said == [None, {"user": "t"}, {"user": "t", **hints}, hints]
