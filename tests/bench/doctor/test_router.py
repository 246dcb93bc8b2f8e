"""What the doctor finds of a router: each trap, in a sentence that says what to do."""

import json
import random
import threading
from contextlib import ExitStack, closing

import pytest

from support.router_double import Behaviour, RouterDouble, ServerDouble
from support.servers import free_port
from vllm_radix.cli import main
from vllm_radix.exits import ExitCode
from vllm_radix_bench.doctor import router_events
from vllm_radix_bench.doctor.finding import Finding, Status
from vllm_radix_bench.doctor.router_events import prompts_each


class Deployment:
    """Servers, a router, and the doctor's look at them."""

    def __init__(self, stack, capsys):
        self._stack, self._capsys = stack, capsys
        self.servers = []

    def serve(self, count=2, **behaviour):
        self.servers += [
            self._stack.enter_context(closing(ServerDouble(Behaviour(**behaviour))))
            for _ in range(count)
        ]

    def route(self, **how):
        router = RouterDouble(*self.servers, **how)
        self.router = self._stack.enter_context(closing(router))

    @property
    def sources(self):
        return [
            word
            for server in self.servers
            for word in ("--kv-event-source",
                         f"{server.url}={','.join(server.endpoints)}")
        ]  # fmt: skip

    def doctor(self, *words, wait="2"):
        words = ["doctor", "--router", self.router.url, "--wait", wait, *words]
        code = main([*words, "--json"])
        said = json.loads(self._capsys.readouterr().out)
        assert said["routes"] == (code == ExitCode.GOOD)
        return [
            Finding(**{**one, "status": Status(one["status"])})
            for one in said["findings"]
        ]

    def only_problem(self, *words, wait="2"):
        found = self.doctor(*words, wait=wait)
        problems = [one for one in found if one.status is Status.PROBLEM]
        assert len({(one.found, one.fix) for one in problems}) == 1, problems
        assert all(one.fix for one in problems)
        return problems


@pytest.fixture
def deployment(capsys, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    # What is in this process counts at once.
    monkeypatch.setattr(router_events, "_SETTLE_SECONDS", 0.3)
    with ExitStack() as stack:
        yield Deployment(stack, capsys)


def of(findings, subject):
    (one,) = [one for one in findings if one.subject == subject]
    return one


def test_a_good_deployment_of_two_servers(deployment):
    deployment.serve()
    deployment.route()
    found = deployment.doctor(*deployment.sources)
    assert {one.status for one in found} == {Status.OK}
    first, second = sorted(server.url for server in deployment.servers)
    assert of(found, "router").found.endswith(f" sends to {first}, {second}")
    server = deployment.servers[0]
    assert of(found, f"server {first}").found == "m, blocks of 16, radix"
    told = f"come from {server.endpoints[0]}, in blocks of 16"
    assert of(found, f"events {server.url}").found == told
    routed = "8 of 8 prompts went where they are held"
    assert of(found, "routing").found == routed
    # The router's requests were found where the doctor's own were.
    assert [server.lengths for server in deployment.servers] == [[33] * 4] * 2
    assert len(deployment.router.prompts) == 9
    assert deployment.router.prompts[0] == deployment.router.prompts[1]


def test_a_good_deployment_of_ranks(deployment):
    deployment.serve(1, ranks=3, radix=False)
    deployment.route(by_rank=True)
    found = deployment.doctor(*deployment.sources)
    assert {one.status for one in found} == {Status.OK}
    (server,) = deployment.servers
    assert of(found, "router").found.endswith(
        f" sends to {server.url}@0, {server.url}@1, {server.url}@2"
    )
    assert of(found, f"server {server.url}").found == "m, blocks of 16"
    for rank, endpoint in enumerate(server.endpoints):
        assert endpoint in of(found, f"events {server.url} rank {rank}").found


@pytest.mark.parametrize(("status", "reads"), [(403, "answers 403"), (500, "HTTP")])
def test_a_server_that_does_not_tokenize(deployment, status, reads):
    deployment.serve(render=status)
    deployment.route()
    (problem, _) = deployment.only_problem(*deployment.sources)
    assert problem.subject.startswith("render http://")
    assert reads in problem.found and "routes it by load alone" in problem.found
    assert ("--enable-scale-out" in problem.fix) == (status == 403)


def test_a_topic(deployment):
    deployment.serve(topic="kv@pod")
    deployment.route()
    (problem, _) = deployment.only_problem(*deployment.sources)
    assert "under the topic 'kv@pod'" in problem.found
    assert 'leave "topic" out' in problem.fix


def test_another_block_size(deployment):
    deployment.serve(block_size=32)
    deployment.route()
    (problem, _) = deployment.only_problem(*deployment.sources)
    assert "blocks of 32 tokens, and the router looks for blocks of 16" in problem.found
    assert problem.fix == "give the router --kv-event-block-size 32"
    found = deployment.doctor(*deployment.sources, "--kv-event-block-size", "32")
    assert {one.status for one in found} == {Status.OK}
    assert deployment.servers[0].lengths == [65] * 5


def test_events_that_do_not_arrive(deployment):
    deployment.serve(1, publishes=False)
    deployment.route()
    (problem,) = deployment.only_problem(*deployment.sources, wait="0.5")
    assert problem.found == "none came within 0.5 s of a request"
    assert "--kv-events-config" in problem.fix


def test_an_endpoint_at_which_nothing_listens(deployment):
    deployment.serve(1)
    deployment.route()
    source = f"{deployment.servers[0].url}=tcp://127.0.0.1:{free_port()}"
    (problem,) = deployment.only_problem("--kv-event-source", source)
    assert problem.found.startswith("nothing listens at tcp://127.0.0.1:")
    assert problem.found.endswith("(Connection refused)")
    assert problem.fix.endswith('"tcp://*:5557"}\'; vLLM listens only at a *')


def test_something_else_at_an_endpoint(deployment):
    deployment.serve(1, strange=True)
    deployment.route()
    (problem,) = deployment.only_problem(*deployment.sources, wait="1")
    assert problem.found.endswith("is no KV event of vLLM's")


def test_endpoints_out_of_order(deployment):
    deployment.serve(1, ranks=2, swapped=True)
    deployment.route(by_rank=True)
    found = deployment.doctor(*deployment.sources)
    first, second = deployment.servers[0].endpoints
    problem = of(found, f"events {deployment.servers[0].url} rank 0")
    assert problem.found == f"come from {second}, and the router hears {first} for it"
    assert "--kv-event-source" in problem.fix


def test_fewer_endpoints_than_ranks(deployment):
    deployment.serve(1, ranks=2)
    deployment.route(by_rank=True)
    (server,) = deployment.servers
    source = f"{server.url}={server.endpoints[0]}"
    (problem,) = deployment.only_problem("--kv-event-source", source)
    assert problem.found == "ranks: 2, sources of their events: 1"
    assert f"--kv-event-source {server.url}=tcp://HOST:PORT,tcp" in problem.fix


def test_a_source_of_another_server(deployment):
    deployment.serve(1)
    deployment.route()
    more = ["--kv-event-source", "http://elsewhere:1=tcp://127.0.0.1:1"]
    (problem,) = deployment.only_problem(*deployment.sources, *more)
    assert problem.subject == "events http://elsewhere:1"
    assert deployment.servers[0].url in problem.fix


def test_a_request_that_fails(deployment):
    deployment.serve(1, completes=400)
    deployment.route()
    (problem,) = deployment.only_problem(*deployment.sources)
    assert problem.found == "a request of 33 tokens fails: HTTP status 400"


def test_a_router_that_sends_astray(deployment):
    deployment.serve()
    deployment.route(astray=True)
    note = of(deployment.doctor(*deployment.sources), "routing")
    assert note.status is Status.NOTE
    assert note.found.startswith("4 of 8 prompts went where they were not cached")


@pytest.mark.parametrize("servers", [2, 5])
def test_a_router_that_takes_turns(deployment, servers):
    """Though each prompt's own turn is that of the server that holds it."""
    deployment.serve(servers)
    deployment.servers.sort(key=lambda server: server.url)
    deployment.route(in_turn=True)
    note = of(deployment.doctor(*deployment.sources), "routing")
    assert note.status is Status.NOTE
    assert "prompts went where they were not cached" in note.found


def test_a_router_that_hashes_prompts(deployment, monkeypatch):
    """The first prompt of each server is sent where it is held, by luck."""
    rng = random.Random(2)
    monkeypatch.setattr(router_events.random, "SystemRandom", lambda: rng)
    deployment.serve()
    deployment.servers.sort(key=lambda server: server.url)
    deployment.route(hashes=True)
    note = of(deployment.doctor(*deployment.sources), "routing")
    first = deployment.servers[0].held[0][0], deployment.servers[1].held[0][0]
    assert [sum(prompt) % 2 for prompt in first] == [0, 1], "choose another seed"
    assert note.status is Status.NOTE
    assert "prompts went where they were not cached" in note.found


@pytest.mark.parametrize(
    ("engines", "each"), [(2, 4), (3, 2), (4, 1), (16, 1), (1000, 1)]
)
def test_luck_is_rarer_than_one_in_a_hundred(engines, each):
    assert prompts_each(engines) == each
    assert (1 / engines) ** (each * engines) < 0.01
    assert each == 1 or (1 / engines) ** ((each - 1) * engines) >= 0.01


def test_engines_that_the_router_does_not_know(deployment):
    deployment.serve(1, engines=4)
    deployment.route()
    found = deployment.doctor()
    (note,) = [one for one in found if "engines" in one.found]
    assert note.status is Status.NOTE
    assert note.fix == "give the router --intra-node-data-parallel-size 4"
    assert "--kv-event-source" in of(found, "events").fix


def test_a_server_without_metrics_of_a_short_context(deployment):
    deployment.serve(1, metrics=False, max_model_len=20)
    deployment.route()
    found = deployment.doctor(*deployment.sources)
    assert {one.status for one in found} == {Status.OK}
    assert of(found, f"server {deployment.servers[0].url}").found == "m"
    assert deployment.servers[0].lengths == [19]


def test_large_blocks_of_a_server_without_metrics(deployment):
    deployment.serve(1, metrics=False, block_size=1024)
    deployment.route()
    sources = [*deployment.sources, "--kv-event-block-size"]
    found = deployment.doctor(*sources, "1024")
    assert {one.status for one in found} == {Status.OK}
    (problem,) = deployment.only_problem(*sources, "64")
    assert "of blocks of 1024 tokens" in problem.found


@pytest.mark.parametrize(
    ("served", "reads", "fix", "lengths"),
    [
        (
            {"block_size": 4096, "metrics": False},
            (
                "none came within 0.5 s of a request of 2049 tokens, of which there "
                "are none if blocks are larger: their size is not told"
            ),
            "let the doctor see the server's /metrics",
            [2049],
        ),
        (
            {"block_size": 32, "max_model_len": 20},
            (
                "cannot be probed: a prompt of the longest length, 19 tokens, is "
                "shorter than a block of 32"
            ),
            "",
            [],
        ),
        (
            {"metrics": False, "max_model_len": 1},
            (
                "cannot be probed: a prompt of the longest length, 0 tokens, is "
                "shorter than a block of 1"
            ),
            "",
            [],
        ),
    ],
)
def test_what_cannot_be_probed_is_no_problem(
    deployment, capsys, served, reads, fix, lengths
):
    deployment.serve(1, **served)
    deployment.route()
    found = deployment.doctor(*deployment.sources, wait="0.5")
    (server,) = deployment.servers
    told = Finding(f"events {server.url}", Status.NOTE, reads, fix)
    assert [one for one in found if one.status is not Status.OK] == [told]
    assert server.lengths == lengths
    words = ["doctor", "--router", deployment.router.url, *deployment.sources]
    if not lengths:
        assert main(words) == ExitCode.GOOD
        said = capsys.readouterr().out
        assert said.endswith("No problem was found; a note above may be one.\n")


def test_servers_are_asked_at_once(deployment):
    """None of them answers before each of them was asked."""
    deployment.serve(16, together=threading.Barrier(16))
    deployment.route()
    found = [one for one in deployment.doctor() if one.subject.startswith("server ")]
    assert {one.status for one in found} == {Status.OK}
    urls = sorted(server.url for server in deployment.servers)
    assert [one.subject for one in found] == [f"server {url}" for url in urls]


def test_a_worker_s_address_however_it_is_written(deployment):
    deployment.serve(1, ranks=2)
    (server,) = deployment.servers
    more = [{"url": f"{server.url}/@0"}, {"url": f"{server.url}@1"}]
    router = RouterDouble(more=more)
    deployment.router = deployment._stack.enter_context(closing(router))
    router.servers, router._urls = deployment.servers, lambda: []
    found = deployment.doctor(*deployment.sources)
    assert {one.status for one in found} == {Status.OK}, found


@pytest.mark.parametrize(
    "entry", [{"url": "foo"}, {"url": None}, None, {}, 7, {"url": "grpc://a:1"}]
)
def test_a_worker_that_is_no_address(deployment, entry):
    deployment.serve(1)
    deployment.route(more=[entry])
    note, *others = deployment.doctor(*deployment.sources)
    named = entry.get("url") if isinstance(entry, dict) else entry
    said = f"names {named!r}, which is no address of HTTP: not looked at"
    assert (note.subject, note.status, note.found) == ("router", Status.NOTE, said)
    assert {one.status for one in others} == {Status.OK}


@pytest.mark.parametrize(
    ("model", "reads"),
    [
        ({"model": ""}, "answers, but names no model"),
        ({"model": 7}, "answers, but names no model"),
        ({"max_model_len": "x"}, "answers, but tells 'x' as the max_model_len of m"),
        ({"max_model_len": -1}, "answers, but tells -1 as the max_model_len of m"),
    ],
)
def test_a_server_that_says_strange_things(deployment, model, reads):
    deployment.serve(1, **model)
    deployment.route()
    (problem,) = deployment.only_problem()
    assert problem.found == reads


def test_servers_that_are_named(deployment):
    deployment.serve()
    deployment.route(workers=404)
    problem = of(deployment.doctor(), "router")
    assert "does not tell its servers (HTTP status 404)" in problem.found
    named = [w for one in deployment.servers for w in ("--server", f"{one.url}/v1")]
    found = deployment.doctor(*named, *deployment.sources)
    assert {one.status for one in found} == {Status.OK}


def test_a_server_that_is_gone(deployment):
    deployment.serve()
    deployment.route()
    gone, _ = deployment.servers
    gone.close()
    problem = of(deployment.doctor(), f"server {gone.url}")
    assert problem.found.startswith("does not answer (")


def test_a_router_without_servers_and_none(deployment, capsys):
    deployment.route()
    (problem,) = deployment.only_problem()
    assert problem.found == "it knows no server"
    words = ["doctor", "--router", f"127.0.0.1:{free_port()}"]
    assert main(words) == ExitCode.VERDICT
    out = capsys.readouterr().out
    assert "does not tell its servers" in out and "to do: " in out
    assert out.endswith(
        "The router does not route by prefixes: a problem, see above.\n"
    )


def test_an_api_key(deployment, monkeypatch):
    deployment.serve(1, api_key="secret")
    deployment.route()
    (problem,) = deployment.only_problem()
    assert "does not answer (HTTP status 401)" in problem.found
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    found = deployment.doctor(*deployment.sources)
    assert {one.status for one in found} == {Status.OK}


def test_models_that_differ(deployment):
    deployment.serve(1)
    deployment.serve(1, model="n")
    deployment.route()
    note = of(deployment.doctor(), "model")
    assert note.found == "the servers name different ones: m, n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--router", "ftp://x"], "--router: 'ftp://x' is not the address"),
        (["--server", "ftp://x"], "--server: 'ftp://x' is not the address"),
        (["--kv-event-source", "http://a:1"], "is not URL=ENDPOINT[,ENDPOINT...]"),
        (["--kv-event-source", "http://a:1=5557"], "'5557' is no endpoint"),
        (["--kv-event-source", "http://a:1=tcp://*:1"], "'tcp://*:1' is no endpoint"),
        (
            ["--kv-event-source", "http://a:1=tcp://a b:1"],
            "--kv-event-source: ZMQ does not connect to 'tcp://a b:1' (Invalid",
        ),
        (
            [
                "--kv-event-source",
                "a:1=tcp://b:1",
                "--kv-event-source",
                "a:1=tcp://b:2",
            ],
            "--kv-event-source: http://a:1 is named twice",
        ),
        (["--kv-event-block-size", "0"], "'0' is not a whole number from 1"),
        (["--wait", "0"], "'0' is not a number from 0.1"),
        (["MODEL"], "unrecognized arguments: MODEL"),
    ],
)
def test_bad_input_is_a_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--router", "http://localhost:1", *words])
    assert ended.value.code == ExitCode.INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
