"""Radix on vLLM's CUDA path gives stock's answers, asynchronous and not.

Real engines on a pretended H100 (``tests/support/pretended_gpu``): model runner V2,
the Triton attention backend, float32, blocks of 16. Greedy answers may differ where
the model is undecided, as everywhere in this project: within 1e-3.
"""

import arms
import pytest
from cuda_path.double import serve
from cuda_path.jobs import BLOCK, EDGES, JOBS, NUM_BLOCKS, edges, first_turns
from cuda_path.model import EOS, text_of

pytestmark = [pytest.mark.cuda_path, pytest.mark.timeout(900)]

PAIRS = {"radix sync": "stock sync", "radix": "stock", "grouped": "stock"}


def same(engines, ours, job, ties=0.02):
    """Fail unless an arm answers a job as stock does; return both results."""
    requests = (JOBS[job]() if isinstance(job, str) else job)["requests"]
    one, two = engines.ask(PAIRS[ours], job), engines.ask(ours, job)
    found = arms.compare(one["answers"], two["answers"], requests)
    assert not found["wrong"], found
    assert found["compared"] > 0.8 * len(requests)
    assert found["ties"] <= ties * found["compared"]
    for result in (one, two):
        assert result["held_blocks"] == 0, "blocks are held when nobody runs"
    return one, two


@pytest.mark.parametrize(
    ("name", "scheduler", "asynchronous"),
    [
        ("stock sync", "Scheduler", False),
        ("radix sync", "RadixScheduler", False),
        ("stock", "AsyncScheduler", True),
        ("radix", "AsyncRadixScheduler", True),
        ("grouped", "AsyncRadixScheduler", True),
    ],
)
def test_arm_has_the_scheduler_and_worker_of_its_name(
    engines, name, scheduler, asynchronous
):
    found = engines.arm(name).description
    assert found["scheduler"] == scheduler
    assert found["async"] is asynchronous
    assert found["v2_runner"] is True
    assert found["block_size"] == BLOCK
    assert found["plugin_imported"] == (not name.startswith("stock"))
    worker = "vllm.v1.worker.gpu_worker.Worker"
    if name == "grouped":
        worker = "vllm_radix.attention.gpu_worker.GroupedGPUWorker"
    assert found["worker"] == worker


@pytest.mark.parametrize("ours", ["radix", "grouped"])
def test_200_mixed_requests(engines, ours):
    stock, radix = same(engines, ours, "mixed")
    assert stock["requests"] > 190
    assert radix["copies"] > 10, "no hit ended inside a block"
    assert radix["scheduled_tokens"] < 0.9 * stock["scheduled_tokens"]
    cached = [a["cached"] % BLOCK for a in radix["answers"].values()]
    assert len(set(cached)) > BLOCK // 2, "hits end at few places"
    if ours == "grouped":
        counts = radix["attention"]
        assert counts["grouped_steps"] > 10
        assert counts["grouped_extends"] > 5
        assert counts["loaded_tokens"] < counts["stock_tokens"]


@pytest.mark.parametrize("ours", PAIRS)
def test_preempted_requests(engines, ours):
    stock, radix = same(engines, ours, "pressure")
    assert stock["preemptions"] > 0
    assert radix["preemptions"] > 0


@pytest.mark.parametrize("ours", PAIRS)
def test_the_cache_is_reset_in_the_middle(engines, ours):
    for result in same(engines, ours, "resets"):
        assert result["resets"] == 2


@pytest.mark.parametrize("ours", ["radix", "grouped"])
def test_answers_that_end_by_themselves_anywhere_in_a_block(engines, ours):
    _, radix = same(engines, ours, "chats")
    requests = JOBS["chats"]()["requests"]
    ends = set()
    for one, after in zip(requests[::2], requests[1::2], strict=True):
        (said,) = radix["answers"][one["id"]]["outputs"]
        if said["finish"] == "stop" and said["tokens"][-1] == EOS:
            ends.add((len(one["tokens"]) + len(said["tokens"])) % BLOCK)
        assert after["id"] in radix["answers"]
    assert {BLOCK - 1, 0, 1} <= ends, sorted(ends)


def stopped(engines, ours):
    """Return both results of conversations that stop around a block's end."""
    learned = engines.ask("stock", "first_turns")
    job = edges(learned)
    stock, radix = same(engines, ours, job)
    for request in job["requests"][::2]:
        (said,) = radix["answers"][request["id"]]["outputs"]
        assert said["finish"] == "stop"
        assert len(said["tokens"]) == 8
    return stock, radix


@pytest.mark.parametrize("ours", PAIRS)
def test_a_stop_token_around_a_blocks_end(engines, ours):
    stopped(engines, ours)


@pytest.mark.parametrize("over", EDGES)
@pytest.mark.parametrize("ours", PAIRS)
def test_the_next_turn_finds_all_but_the_last_token(engines, ours, over):
    _, radix = stopped(engines, ours)
    known = 3 * BLOCK + over
    found = [
        answer["cached"]
        for name, answer in radix["answers"].items()
        if name.endswith(":next") and name.startswith(f"{over}:")
    ]
    assert len(found) == 2
    assert min(found) >= known - 1


@pytest.mark.parametrize("ours", ["radix", "grouped"])
def test_several_answers_by_chance_with_seeds(engines, ours):
    stock, radix = (engines.ask(name, "sampled") for name in ("stock", ours))
    assert stock["answers"].keys() == radix["answers"].keys()
    for name, one in stock["answers"].items():
        theirs = [answer["tokens"] for answer in one["outputs"]]
        assert len(theirs) == 3
        mine = [answer["tokens"] for answer in radix["answers"][name]["outputs"]]
        assert theirs == mine
        assert len({tuple(tokens) for tokens in mine}) == 3, "chance has no say"
    assert radix["held_blocks"] == 0


@pytest.mark.parametrize("ours", ["radix", "grouped"])
def test_structured_answers(engines, ours):
    import re

    _, radix = same(engines, ours, "structured")
    for request in JOBS["structured"]()["requests"]:
        (said,) = radix["answers"][request["id"]]["outputs"]
        tokens = [token for token in said["tokens"] if token != EOS]
        grammar = request["structured"]
        pattern = grammar.get("regex") or "|".join(grammar["choice"])
        assert re.fullmatch(pattern, text_of(tokens)), text_of(tokens)


@pytest.mark.parametrize("name", ["stock", "radix"])
def test_vllms_own_kernels_say_the_same(engines, name):
    """Everywhere else two of them are replaced: see ``plain_attention``."""
    plain = {**first_turns(), "requests": first_turns()["requests"][:4]}
    own = {**plain, "within": ["support.pretended_gpu.plain_attention:vllms_own"]}
    one, two = engines.ask(name, plain), engines.ask(name, own)
    found = arms.compare(one["answers"], two["answers"], plain["requests"])
    assert found == {"compared": 4, "ties": 0, "wrong": [], "differences": []}
    assert two["seconds"] > one["seconds"], "nothing was interpreted"


@pytest.mark.parametrize("job", ["mixed", "pressure", "resets"])
def test_the_double_reads_nothing_wrong(job):
    """The same traffic without a model: every slot that is read holds its own."""
    double = serve(JOBS[job](), NUM_BLOCKS, lag=1)
    assert not double.scheduler.requests
    pool = double.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == NUM_BLOCKS


@pytest.mark.parametrize(
    ("fault", "ours", "job"),
    [
        ("a_match_goes_on_for_a_block_too_many", "radix", "resets"),
        ("blocks_are_not_copied", "radix", "resets"),
        ("a_plan_drops_an_item", "grouped", "resets"),
        ("tables_are_the_neighbours", "grouped", "resets"),
    ],
)
def test_a_planted_fault_is_seen(engines, fault, ours, job):
    made = JOBS[job]()
    stock = engines.ask("stock", job)
    wrong = engines.ask(ours, {**made, "within": [f"cuda_path.faults:{fault}"]})
    found = arms.compare(stock["answers"], wrong["answers"], made["requests"])
    assert found["wrong"], "nobody noticed"
