"""The study of real routers, without engines: its load, placement and table."""

import json
from types import SimpleNamespace

import pytest

from vllm_radix.exits import ExitCode
from vllm_radix_bench.study import real_routers, vllm_router
from vllm_radix_bench.study.real_routers import Deployment, Row, load, text_table


def test_the_load_is_each_bank_as_often_and_the_same_again():
    prompts = load(banks=3, questions=4, seed=1)
    assert prompts == load(banks=3, questions=4, seed=1) != load(3, 4, seed=2)
    assert sorted(bank for bank, _ in prompts) == [0] * 4 + [1] * 4 + [2] * 4
    begin = {bank: tuple(prompt[:310]) for bank, prompt in prompts}
    assert len({*begin.values()}) == 3
    assert all(tuple(prompt[:310]) == begin[bank] for bank, prompt in prompts)
    assert len({tuple(prompt) for _, prompt in prompts}) == 12


def test_the_same_prompts_come_in_each_order():
    orders = {order: load(3, 4, 1, order) for order in real_routers.ORDERS}
    banks = {order: [bank for bank, _ in sent] for order, sent in orders.items()}
    assert banks["in turn"] == [0, 1, 2] * 4
    assert banks["by bank"] == [0] * 4 + [1] * 4 + [2] * 4
    assert banks["random"] not in (banks["in turn"], banks["by bank"])
    assert sorted(orders["random"]) == sorted(orders["by bank"])
    assert orders["random"] == load(3, 4, 1)


def deployment(separate):
    servers = [
        SimpleNamespace(base_url=f"http://h:{port}", model_name="m") for port in (1, 2)
    ]
    return Deployment("radix", servers if separate else servers[:1], [7, 9])


def test_ranks_are_named_to_the_router_by_endpoint_and_servers_by_url():
    words = deployment(separate=False).router_words(["kv_aware"])
    assert words[words.index("--intra-node-data-parallel-size") + 1] == "2"
    sources = [w for w in words if "tcp" in w]
    assert sources == ["http://h:1=tcp://127.0.0.1:7,tcp://127.0.0.1:9"]
    words = deployment(separate=True).router_words(["kv_aware"])
    assert "--intra-node-data-parallel-size" not in words
    sources = [w for w in words if "tcp" in w]
    assert sources == ["http://h:1=tcp://127.0.0.1:7", "http://h:2=tcp://127.0.0.1:9"]
    assert not [w for w in deployment(True).router_words(["x"]) if "kv" in w]


def test_banks_are_placed_in_turn():
    assert [deployment(True).place(bank)[0][-1] for bank in range(3)] == ["1", "2", "1"]
    headers = [deployment(False).place(bank)[1] for bank in range(3)]
    assert [h["X-data-parallel-rank"] for h in headers] == ["0", "1", "0"]


def test_the_table_tells_the_range_of_repeats():
    rows = [
        Row("stock", "round_robin", 100, 1234, (1, 2)),
        Row("stock", "round_robin", 100, 1200, (2, 1)),
        Row("radix", "round_robin", 100, 900, (1, 2)),
        Row("radix", "kv_aware", 100, 5, (0, 3)),
    ]
    assert text_table(rows).splitlines()[2:] == [
        "| round_robin | 1,200-1,234 → 900 | 1/2 → 1/2 |",
        "| kv_aware | 5 | 0/3 |",
    ]


def test_a_router_that_is_not_installed_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm_router.sys, "executable", str(tmp_path / "python"))
    with (
        pytest.raises(vllm_router.RouterError, match="pip install vllm-router") as seen,
        vllm_router.running_router([]),
    ):
        pass
    assert seen.value.code == ExitCode.ENGINE


def test_a_router_that_refuses_its_options_says_so():
    words = ["--policy", "nonsense", "--worker-urls", "http://127.0.0.1:1"]
    with (
        pytest.raises(vllm_router.RouterError, match="did not come up") as seen,
        vllm_router.running_router(words),
    ):
        pass
    assert "nonsense" in seen.value.details


def test_a_run_is_kept_with_its_load(tmp_path, monkeypatch, capsys):
    def run(self, routing, prompts, clients):
        return Row(self.arm, routing, len(prompts), clients, (1, 1))

    class Deployed:
        def __init__(self, arm, *rest):
            self.deployment = Deployment(arm, [object()], [1, 2])

        def __enter__(self):
            return self.deployment

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(real_routers, "deployed", Deployed)
    monkeypatch.setattr(Deployment, "run", run)
    output = tmp_path / "rows.json"
    assert real_routers.main(["MODEL", "--repeats", "1", "--output", str(output)]) == 0
    kept = json.loads(output.read_text())
    assert len(kept["rows"]) == 2 * 6 and kept["load"]["questions"] == 20
    assert kept["rows"][0]["prompt_tokens"] == 120
    assert "| kv_aware | 8 → 8 | 1/1 → 1/1 |" in capsys.readouterr().out
