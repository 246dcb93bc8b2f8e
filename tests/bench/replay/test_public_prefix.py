"""Salted traffic with ``public_prefix``: the fewest possible tokens stay a bound."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine.test_request_keys import request

from support.prompts import prompt
from vllm_radix.cli import main
from vllm_radix.engine.public_prefixes import Declared, First
from vllm_radix.tree import BYTES_PER_TOKEN, common_units
from vllm_radix_bench.ab.loads import Forest
from vllm_radix_bench.ab.loads_of import shared_keys
from vllm_radix_bench.replay import oracles, runner
from vllm_radix_bench.replay.arms import parse_arm
from vllm_radix_bench.replay.cache_keys import CacheKeys
from vllm_radix_bench.report.cli_types import InputError
from vllm_radix_bench.workloads.turn import Turn, longest_path

PUBLIC = prompt("system", 100)
SALTS = "abc"
OPTION = {"public_prefix": {"prompts": [PUBLIC]}, "min_sub_block_tokens": 1}
SHARING = f"radix:{json.dumps(OPTION)}"
APART = 'radix:{"min_sub_block_tokens": 1}'


def salted(first=PUBLIC):
    """Return conversations of three salts that begin alike."""
    return [
        Turn(
            [*first, *prompt(f"{salt}{number}", 40)],
            5,
            salt=salt,
            children=[Turn(prompt(f"{salt}{number} more", 30), 5, salt=salt)],
        )
        for number in range(2)
        for salt in SALTS
    ]


def options(layout=None, **fields):
    return runner.Options(
        [400],
        block_size=32,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        layout=layout,
        **fields,
    )


def computed(arm, roots, asked):
    arm, longest = parse_arm(arm), longest_path(roots)
    return runner.run_arm(arm, roots, 400, asked, longest).computed_prompt_tokens


@pytest.mark.parametrize(
    ("layout", "shared"), [(None, 96), ("full/32", 96), ("full/32+swa:64/32", 100)]
)
def test_radix_reaches_the_fewest_possible_and_never_beats_it(layout, shared):
    roots = salted()
    if shared == 96:
        # Of two requests that part inside a block, the second comes later.
        for number, root in enumerate(roots):
            root.arrival = 100.0 * number
    asked = options(layout, arms=["stock", SHARING])
    apart = oracles.infinite_cache(roots)
    assert apart == 3 * 100 + 6 * (40 + 30)
    fewest = runner.new_result(roots, asked)["infinite_cache"]
    assert fewest == apart - 2 * shared
    # An answer's last token is computed by the turn that goes on from it.
    last = sum(1 for root in roots for _ in root.children)
    assert computed(SHARING, roots, asked) == fewest + last
    assert computed(APART, roots, asked) == apart + last


def test_without_the_option_and_without_salts_nothing_changes():
    roots = salted()
    for arms in (["stock"], ["stock", APART]):
        made = runner.new_result(roots, options(arms=arms))
        assert made["infinite_cache"] == oracles.infinite_cache(roots)
    for root in roots:
        root.salt = root.children[0].salt = None
    made = runner.new_result(roots, options(arms=["stock", SHARING]))
    assert made["infinite_cache"] == oracles.infinite_cache(roots) == 100 + 6 * 70


def test_a_conversation_that_grows_past_what_is_shared_is_computed_once_more():
    by = CacheKeys(First(64), 16)
    roots = [Turn(PUBLIC[:40], 9, salt=salt, children=[Turn([5] * 60, 1, salt=salt)])
             for salt in "ab"]  # fmt: skip
    # Prompts of 40 tokens share nothing; those of 109 their first 64, answers apart.
    roots[1].tokens = [1] * 40
    assert oracles.infinite_cache(roots, by) == 2 * (40 + 109)
    assert oracles.infinite_cache(roots) == 2 * 100
    # The arm that shares nothing may compute fewer: it counts as well.
    arm = 'radix:{"public_prefix": {"first_tokens": 64}}'
    made = runner.new_result(roots, options(arms=["stock", arm]))
    assert made["infinite_cache"] == 200


def test_best_order_and_best_eviction_know_what_is_shared(tmp_path):
    trace = tmp_path / "trace.jsonl"
    lines = [
        {
            "token_ids": [*PUBLIC, *prompt(f"{salt}{number}", 40)],
            "output_length": 4,
            "salt": salt,
            "arrival": 100.0 * (3 * number + at),
        }
        for number in range(3)
        for at, salt in enumerate(SALTS)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "out.json"
    words = ["replay", str(trace), "--block-size", "16", "--blocks", "14"]
    words += ["--max-num-seqs", "1", "--max-num-batched-tokens", "512"]
    off = {"sub_block": False}
    arms = ["stock", f"radix:{json.dumps(OPTION | off)}", f"radix:{json.dumps(off)}"]
    assert main([*words, "--arms", *arms, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    (cell,) = result["cells"]
    _, sharing, apart = (cell["arms"][arm] for arm in arms)
    for arm in (sharing, apart):
        assert arm["hit_rate"] <= arm["hit_rate_best_eviction"]
    assert apart["hit_rate_best_eviction"] < sharing["hit_rate"]
    assert result["infinite_cache"] <= cell["known_in_advance"]
    assert cell["known_in_advance"] <= sharing["computed_prompt_tokens"]


def test_keys_of_sequences_are_those_of_requests():
    """Whatever the salt, the size of blocks and what is declared."""
    from vllm_radix.engine.request_keys import RequestKeys

    for size in (1, 16):
        keys, by = RequestKeys(size), CacheKeys(Declared([PUBLIC, PUBLIC[:40]]), size)
        keys.public = by._public
        made = {}
        for salt in (None, "a", "b"):
            for count in (10, 40, 41, 64, 99, 100, 101, 130):
                tokens = [*PUBLIC, *prompt("mine", 40)][:count]
                name = f"{salt} {count}"
                one = request(tokens, cache_salt=salt)
                home = by.home(salt, tokens)
                whole = count // size * size
                theirs = keys.namespace(one), keys.key(one, whole)[: 4 * whole]
                made[name] = theirs, (home.namespace, home.key(tokens)[: 4 * whole])
        for theirs, ours in made.values():
            for other, mine in made.values():
                assert _shared(*theirs, *other) == _shared(*ours, *mine)


def _shared(namespace, key, other_namespace, other):
    """How many tokens two keys have in common in one namespace."""
    same = namespace == other_namespace
    return common_units(key, 0, other, 0, BYTES_PER_TOKEN) if same else 0


def test_texts_and_events_are_refused(tmp_path, capsys):
    for value in ({"prompts": ["text"]}, {"marker": "<|end|>", "within": 9}):
        arm = f"radix:{json.dumps({'public_prefix': value})}"
        with pytest.raises(InputError, match="a replay reads no texts: write token"):
            parse_arm(arm)
    words = ["replay", "--workload", "chat", "--engines", "2", "--routing", "events"]
    output = tmp_path / "out" / "r.json"
    with pytest.raises(SystemExit):
        main([*words, "--arms", SHARING, "--output", str(output)])
    said = " ".join(capsys.readouterr().err.split())
    assert "--routing: events reads events, which know nothing of what salts" in said
    assert not output.parent.exists()


def test_an_ab_counts_what_its_servers_share(smollm2):
    def serve(**radix):
        return SimpleNamespace(
            model=smollm2, tokenizer=smollm2, trusts_code=False, radix=radix
        )

    assert shared_keys(serve(), 16) == []
    roots = salted()
    keys = shared_keys(serve(**OPTION), 32)
    load = Forest("trace", "t", "requests of a trace", roots, keys=keys)
    assert load.fewest_tokens == oracles.infinite_cache(roots) - 2 * 100
    assert load.some(3).fewest_tokens == 100 + 3 * 70
    plain = Forest("trace", "t", "requests of a trace", roots)
    assert plain.fewest_tokens == oracles.infinite_cache(roots)
    text = "You are the assistant of a small shop that sells bicycles. Be short."
    by, _ = shared_keys(serve(public_prefix={"prompts": [text]}), 32)
    from vllm_radix_bench.workloads.encoders import load_encode

    tokens = load_encode(Path(smollm2))(f"{text} What is a chain?")
    assert by.home("a", tokens).start > 8
    with pytest.raises(InputError, match="'marker' 'x y z' has 3 tokens; allow"):
        shared_keys(serve(public_prefix={"marker": "x y z", "within": 1}), 32)
