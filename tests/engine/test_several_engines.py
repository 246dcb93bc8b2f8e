"""A replay of two engines against two real ones that get the same requests."""

from contextlib import ExitStack
from pathlib import Path

import pytest

from vllm_radix_bench.ab.offline.arm import Settings, as_request
from vllm_radix_bench.ab.offline.process import ArmProcess
from vllm_radix_bench.replay import arms, oracles, runner
from vllm_radix_bench.routing import parse_routing
from vllm_radix_bench.sim.driver import FleetRun
from vllm_radix_bench.workloads.encoders import load_encode
from vllm_radix_bench.workloads.sizing import build
from vllm_radix_bench.workloads.turn import longest_path

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

ENGINES, BLOCKS = 2, 64
OPTIONS = runner.Options(
    [BLOCKS],
    block_size=32,
    max_num_seqs=4,
    max_num_batched_tokens=512,
    engines=ENGINES,
)
RADIX = {"max_extra_wait": 1e6}
"""Seconds must not decide anything here, on a machine of any speed."""


def fleet_run(arm, roots, longest, answers):
    """Run two engines without a model; requests go where they went before."""
    schedulers = [
        runner.scheduler_of(arm, BLOCKS, OPTIONS, longest) for _ in range(ENGINES)
    ]
    rule = parse_routing("history").make(ENGINES)
    return FleetRun(schedulers, OPTIONS.cost, rule, answers).run(roots)


@pytest.mark.parametrize("name", ["stock", "radix"])
def test_two_engines_are_two_real_ones_request_by_request(name, tiny, tmp_path):
    """Few-shot banks, three times what both caches hold, all at once."""
    work = build(
        "few-shot",
        load_encode(Path(tiny)),
        num_blocks=ENGINES * BLOCKS,
        block_size=OPTIONS.block_size,
        pressure=3,
        seed=0,
        scale=0.25,
    )
    runner.shuffle(work.roots, 0)
    longest = longest_path(work.roots)
    arm = runner.parse_arm("stock")
    if name == "radix":
        arm = arms.radix_arm(name, RADIX)
    settings = Settings(
        model=tiny,
        block_size=OPTIONS.block_size,
        num_blocks=BLOCKS,
        max_num_seqs=OPTIONS.max_num_seqs,
        max_num_batched_tokens=OPTIONS.max_num_batched_tokens,
        max_model_len=longest + 1,
        gpu_memory_utilization=0.5,
        load_format="dummy",
        radix=RADIX if name == "radix" else None,
    )
    placed = fleet_run(arm, work.roots, longest, {})
    shares = [[one.id for one in engine.records] for engine in placed.engines]
    assert min(map(len, shares)) > 20
    with ExitStack() as stack:
        engines = []
        for number in range(ENGINES):
            engines.append(ArmProcess(name, settings, tmp_path / f"{number}.log"))
            stack.callback(engines[-1].stop)
        for engine in engines:
            engine.wait_until_ready()
        real = [
            engine.ask(as_request([work.roots[int(one)] for one in share]))
            for engine, share in zip(engines, shares, strict=True)
        ]
    for share, run in zip(shares, real, strict=True):
        for record in run["records"]:
            record["id"] = share[int(record["id"])]
    records = [record for run in real for record in run["records"]]
    answers = {record["id"]: record["output"] for record in records}
    replayed = fleet_run(arm, work.roots, longest, answers)
    for share, engine, run in zip(shares, replayed.engines, real, strict=True):
        assert [one.id for one in engine.records] == share
        assert engine.computed_prompt_tokens == run["computed_prompt_tokens"]
        assert engine.engine_steps == run["engine_steps"]
        for mine, theirs in (
            ("cached_tokens", "cached_tokens"),
            ("preemptions", "preemptions"),
            ("steps", "steps_to_first_token"),
        ):
            found = {one.id: getattr(one, mine) for one in engine.records}
            assert found == {one["id"]: one[theirs] for one in run["records"]}
    computed = sum(run["computed_prompt_tokens"] for run in real)
    assert replayed.computed_prompt_tokens == computed
    assert computed >= oracles.infinite_cache(work.roots)
