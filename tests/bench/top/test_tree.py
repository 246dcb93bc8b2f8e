"""``vllm-radix top --tree``: made-up events, in vLLM's own encoding and by its own
publisher."""

import json
import re
import socket
import time
from io import StringIO

import msgspec
import pytest
from bench.top.test_top import OURS, Server
from vllm.distributed import kv_events as vllms

from support.servers import free_port
from vllm_radix.cli import main
from vllm_radix.exits import ExitCode
from vllm_radix_bench.top.kv_events import Batch, Feed
from vllm_radix_bench.top.kv_tree import KVTree, largest

SIZE = 4
CAPACITY = "# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{%s} 1.0\n"


def stored(names, parent=None, first=0, **more):
    """Return the event of blocks named by letters, with tokens from `first` on."""
    tokens = list(range(first, first + SIZE * len(names)))
    return vllms.BlockStored(
        block_hashes=[name.encode() for name in names],
        parent_block_hash=parent and parent.encode(),
        token_ids=tokens, block_size=SIZE, lora_id=None, lora_name=None,
        **{"medium": "GPU", **more},
    )  # fmt: skip


def removed(names, **more):
    found = [name.encode() for name in names]
    return vllms.BlockRemoved(block_hashes=found, **{"medium": "GPU", **more})


def batch(*events, at=0.0, rank=0):
    made = vllms.KVEventBatch(ts=at, events=list(events), data_parallel_rank=rank)
    return msgspec.msgpack.Decoder(Batch).decode(msgspec.msgpack.encode(made))


def tree_of(*batches):
    tree = KVTree()
    for number, events in enumerate(batches):
        tree.apply(number, batch(*events, at=number))
    return tree


def shape(tree, most=20):
    found = largest(tree.subtrees(), most)
    return [(x.level, x.blocks, x.tokens, x.depth, len(x.children)) for x in found]


BRANCHING = [stored("abc"), stored("de", "c"), stored("f", "c"), stored("z")]


def test_blocks_in_a_row_are_one_and_branches_are_below():
    tree = tree_of(BRANCHING)
    assert shape(tree) == [
        (0, 6, 24, 3, 2), (1, 2, 8, 5, 0), (1, 1, 4, 4, 0), (0, 1, 4, 1, 0),
    ]  # fmt: skip
    assert [one.begin[0] for one in largest(tree.subtrees(), 1)] == [0]
    assert tree.num_blocks == 7 and not tree.lost_batches


def test_the_largest_come_first_and_with_what_they_are_in():
    assert shape(tree_of(BRANCHING), 2) == [(0, 6, 24, 3, 2), (1, 2, 8, 5, 0)]


def test_removed_blocks_are_gone():
    tree = tree_of(BRANCHING, [removed("e"), removed("f")])
    assert shape(tree) == [(0, 4, 16, 4, 0), (0, 1, 4, 1, 0)]
    tree.apply(2, batch(removed("nothing known"), at=2))
    assert tree.num_blocks == 5


def test_a_parent_that_went_before_its_children_is_told_and_may_come_again():
    tree = tree_of([stored("ab")], [removed("a")])
    (one,) = tree.subtrees()
    assert one.is_cut and one.blocks == 1
    tree.apply(2, batch(stored("a"), at=2))
    (one,) = tree.subtrees()
    assert not one.is_cut and one.blocks == 2


def test_clearing_forgets_a_rank_and_no_other():
    tree = KVTree()
    for rank in (0, 1):
        tree.apply(0, batch(stored("ab"), rank=rank))
    tree.apply(1, batch(vllms.AllBlocksCleared(), at=1, rank=1))
    assert [place[0] for place in tree.places] == [0] and tree.num_blocks == 2


def test_groups_and_media_have_trees_of_their_own():
    one = stored("ab", group_idx=0)
    tree = tree_of([one, stored("b", "a", group_idx=1), stored("a", medium="CPU")])
    assert set(tree.places) == {(0, 0, "GPU"), (0, 1, "GPU"), (0, 0, "CPU")}
    cut = [x.place[1] for x in tree.subtrees() if x.is_cut]
    assert cut == [1] and tree.num_blocks == 4
    tree.apply(1, batch(removed("b", group_idx=1), at=1))
    assert tree.num_blocks == 3


def test_lost_batches_are_told_until_nothing_is_cached():
    tree = tree_of([stored("a")])
    tree.apply(4, batch(stored("b", "a"), at=4))
    assert tree.lost_batches == 3
    tree.apply(5, batch(vllms.AllBlocksCleared(), stored("x"), at=5))
    assert tree.lost_batches == 0 and tree.num_blocks == 1


def test_a_batch_that_comes_twice_counts_once():
    tree = tree_of([stored("a")], [removed("a")])
    tree.apply(0, batch(stored("a"), at=0))
    assert tree.num_blocks == 0 and not tree.lost_batches


def test_an_engine_that_was_started_anew_begins_with_nothing():
    tree = tree_of([stored("abc")], [stored("d", "c")])
    tree.apply(0, batch(stored("x"), at=9))
    assert tree.num_blocks == 1 and not tree.lost_batches
    tree.apply(3, batch(stored("y"), at=12))
    tree.apply(1, batch(stored("z"), at=20))  # anew, and one batch was missed
    assert tree.num_blocks == 1 and tree.lost_batches == 1


def test_a_deep_and_wide_tree_is_no_recursion():
    chain = [stored([f"{n}"], f"{n - 1}" if n else None) for n in range(3000)]
    twigs = [stored([f"{n}x"], f"{n}") for n in range(3000)]
    assert shape(tree_of(chain + twigs), 1)[0][:2] == (0, 6000)


@pytest.fixture
def server():
    server = Server()
    server.text = OURS + CAPACITY % 'num_gpu_blocks="500"'
    yield server
    server.close()


@pytest.fixture
def publisher():
    """vLLM's own, with what was sent before anybody listens."""
    ends = [f"tcp://127.0.0.1:{free_port()}" for _ in range(2)]
    bound = [end.replace("127.0.0.1", "*") for end in ends]
    made = vllms.ZmqEventPublisher(0, *bound)
    made.ends = ends
    made.publish(vllms.KVEventBatch(ts=time.time(), events=BRANCHING))
    yield made
    made.shutdown()


def top(server, publisher, *more, replay=True):
    events, again = publisher.ends
    words = ["top", server.base, "--tree", "--once", "--interval", "0.3"]
    words += ["--events", events, *(["--replay", again] if replay else [])]
    return main([*words, *more])


def reading(server, monkeypatch, then):
    """Do something before the n-th time that events are read; return the times."""
    times, read = [], Feed.read

    def counted(self, seconds):
        what = then.get(len(times))
        times.append(seconds)
        if what is KeyboardInterrupt:
            raise what
        if what is not None:
            what()
        return read(self, seconds)

    monkeypatch.setattr(Feed, "read", counted)
    return times


def test_what_was_cached_before_is_shown(server, publisher, capsys):
    assert top(server, publisher) == ExitCode.GOOD
    out = capsys.readouterr().out
    assert "7 of 500 blocks are known to be cached." in out
    rows = [line.strip(" │|").split() for line in out.splitlines() if "%" in line]
    rows = [[word for word in row if word not in "│|"] for row in rows]
    assert rows == [
        ["1", "6", "24", "85.7%", "3", "2"], ["1.1", "2", "8", "28.6%", "5", "0"],
        ["1.2", "1", "4", "14.3%", "4", "0"], ["2", "1", "4", "14.3%", "1", "0"],
    ]  # fmt: skip
    assert "incomplete" not in out and "No event" not in out


def test_json_has_the_same_and_no_text(server, publisher, capsys):
    assert top(server, publisher, "--json", "--rows", "2") == ExitCode.GOOD
    shown = json.loads(capsys.readouterr().out)
    assert (shown["blocks"], shown["capacity"]) == (7, 500)
    assert [one["blocks"] for one in shown["subtrees"]] == [6, 2]
    assert "text" not in shown["subtrees"][0]


def test_text_is_shown_to_who_asks_for_it(server, publisher, tiny, capsys):
    words = ["--json", "--show-text", "--tokenizer", tiny]
    assert top(server, publisher, *words) == ExitCode.GOOD
    first = json.loads(capsys.readouterr().out)["subtrees"][0]
    from transformers import AutoTokenizer

    assert first["text"] == AutoTokenizer.from_pretrained(tiny).decode(range(12))
    assert top(server, publisher, "--show-text", "--tokenizer", tiny) == ExitCode.GOOD
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_without_replay_nothing_is_known_of_before(server, publisher, capsys):
    time.sleep(0.5)  # the first batch has gone
    assert top(server, publisher, replay=False) == ExitCode.GOOD
    assert "No event came yet" in capsys.readouterr().out


def test_it_follows_until_interrupted(server, publisher, monkeypatch, capsys):
    looks = reading(server, monkeypatch, {2: KeyboardInterrupt})
    words = ["top", server.base, "--tree", "--json", "--events", publisher.ends[0]]
    assert main([*words, "--interval", "0.1"]) == ExitCode.GOOD
    assert len(capsys.readouterr().out.splitlines()) == len(looks) - 1 == 2


def test_the_server_s_end_ends_it(server, publisher, monkeypatch, capsys):
    reading(server, monkeypatch, {1: server.close})
    words = ["top", server.base, "--tree", "--events", publisher.ends[0]]
    assert main([*words, "--interval", "0.1"]) == ExitCode.ENGINE
    out, err = capsys.readouterr()
    assert "of 500 blocks" in out and "does not answer" in err


def test_on_a_terminal_it_waits_for_the_server(server, publisher, monkeypatch):
    class Terminal(StringIO):
        def isatty(self):
            return True

    out = Terminal()
    reading(server, monkeypatch, {1: server.close, 3: KeyboardInterrupt})
    monkeypatch.setattr("sys.stdout", out)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80"), ("LINES", "60")):
        monkeypatch.setenv(name, value)
    events, again = publisher.ends
    words = ["top", server.base, "--tree", "--events", events, "--replay", again]
    assert main([*words, "--interval", "0.1"]) == ExitCode.GOOD
    monkeypatch.undo()
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out.getvalue())
    assert "85.7%" in text and "does not answer" in text
    assert f"{events}; Ctrl-C ends" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--events", "tcp://x:1"], "--events is of --tree"),
        (["--rows", "3"], "--rows is of --tree"),
        (["--tree", "--show-text"], "--show-text and --tokenizer: give both"),
        (["--tree", "--rows", "0"], "argument --rows: '0' is not a whole number"),
        (
            ["--tree", "--show-text", "--tokenizer", "/no/such"],
            "--tokenizer: /no/such is no folder with a tokenizer",
        ),
    ],
)
def test_options_that_cannot_be_used(words, said, server, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["top", server.base, *words])
    assert stop.value.code == ExitCode.INPUT
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


MORE_ENDS = "tcp://u@x:1", "tcp://x:1/y", "tcp://x:1?y", "ipc://", "ipc://" + 108 * "x"


@pytest.mark.parametrize(
    "end", ["localhost", "tcp://*:5557", "http://x:1", "tcp://x", *MORE_ENDS]
)
def test_what_is_no_endpoint(end, server, capsys):
    assert main(["top", server.base, "--tree", "--events", end]) == ExitCode.INPUT
    assert f"--events: {end!r} is no endpoint" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--events", "--replay"])
@pytest.mark.parametrize("end", ["tcp://a b:1", "tcp://a,b:1", "tcp://-:1"])
def test_an_endpoint_that_zmq_refuses(end, option, server, capsys):
    assert main(["top", server.base, "--tree", option, end]) == ExitCode.INPUT
    err = capsys.readouterr().err
    said = f"{option}: ZMQ does not connect to {end!r} (Invalid argument)\n"
    assert err == f"vllm-radix top: {said}"


def test_a_host_whose_name_is_too_long(server, capsys):
    end = f"tcp://{'a' * 70}:1"
    assert main(["top", server.base, "--tree", "--events", end]) == ExitCode.ENGINE
    assert f"--events: nothing listens at {end} (" in capsys.readouterr().err


def test_nothing_that_publishes(server, capsys):
    end = f"tcp://127.0.0.1:{free_port()}"
    assert main(["top", server.base, "--tree", "--events", end]) == ExitCode.ENGINE
    err = capsys.readouterr().err
    assert f"nothing listens at {end}" in err and "--kv-events-config" in err


def test_a_replay_that_says_nothing(server, publisher, monkeypatch, capsys):
    from vllm_radix_bench.top import kv_events

    monkeypatch.setattr(kv_events, "_REPLAY_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        publisher.ends[1] = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        assert top(server, publisher) == ExitCode.ENGINE
    assert "sent nothing for" in capsys.readouterr().err
