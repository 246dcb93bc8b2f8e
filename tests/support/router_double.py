"""Stand for servers with KV events and a router before them, in this process."""

import itertools
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec
import zmq
from vllm.distributed.kv_events import BlockStored, KVEventBatch


class _Http:
    """Answers with what ``answer`` returns: a status, and JSON or text."""

    def __init__(self):
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._reply(*double.answer(self.path, None, self.headers))

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                body = json.loads(self.rfile.read(length))
                self._reply(*double.answer(self.path, body, self.headers))

            def _reply(self, status, body):
                text = body if isinstance(body, str) else json.dumps(body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *arguments):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        # Looked at often for its end.
        threading.Thread(
            target=self._http.serve_forever, args=(0.05,), daemon=True
        ).start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()


@dataclass
class Behaviour:
    """What a server does; each may be a trap."""

    ranks: int = 1
    block_size: int = 16
    topic: str = ""
    render: int = 200
    publishes: bool = True
    completes: int = 200
    strange: bool = False
    radix: bool = True
    metrics: bool = True
    api_key: str = ""
    max_model_len: int = 4096
    model: str = "m"
    engines: int = 0
    swapped: bool = False
    together: threading.Barrier | None = None


@dataclass
class ServerDouble(_Http):
    """Answers as `vllm serve`, and publishes the blocks of new prompts by rank."""

    behaviour: Behaviour = field(default_factory=Behaviour)

    def __post_init__(self):
        super().__init__()
        self._context = zmq.Context()
        self._sockets = []
        for _ in range(self.behaviour.ranks):
            socket = self._context.socket(zmq.PUB)
            socket.bind("tcp://127.0.0.1:*")
            self._sockets.append(socket)
        self.endpoints = [
            socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in self._sockets
        ]
        self.held = [[] for _ in self._sockets]
        self.lengths = []
        self._lock = threading.Lock()

    def close(self):
        super().close()
        self._context.destroy(linger=0)

    def answer(self, path, body, headers):
        does = self.behaviour
        if path == "/metrics":
            return (200, self._metrics()) if does.metrics else (404, "")
        given = headers.get("Authorization")
        if does.api_key and given != f"Bearer {does.api_key}":
            return 401, {"error": "Unauthorized"}
        if path == "/v1/models":
            if does.together is not None:
                does.together.wait(timeout=60)
            model = {"id": does.model, "max_model_len": does.max_model_len}
            return 200, {"data": [model] if does.model else []}
        if path == "/v1/completions/render":
            if does.render != 200:
                return does.render, {"error": "disabled"}
            return 200, [{"request_id": "r", "token_ids": [1, 2]}]
        if path == "/v1/completions":
            if does.completes != 200:
                return does.completes, {"error": "refused"}
            self.complete(body["prompt"], int(headers.get("X-data-parallel-rank", 0)))
            return 200, {"choices": [{"text": "a"}]}
        return 404, {"detail": "Not Found"}

    def _metrics(self):
        does = self.behaviour
        lines = ["# TYPE vllm:cache_config_info gauge"]
        for engine in range(does.engines or does.ranks):
            labels = f'engine="{engine}",block_size="{does.block_size}"'
            lines.append(f"vllm:cache_config_info{{{labels}}} 1.0")
        if does.radix:
            lines.append("# TYPE vllm_radix:info gauge")
            lines.append('vllm_radix:info{engine="0",policy="prefix"} 1.0')
        return "\n".join(lines) + "\n"

    def complete(self, prompt, rank):
        does = self.behaviour
        with self._lock:
            self.lengths.append(len(prompt))
            if prompt in self.held[rank]:
                return
            self.held[rank].append(prompt)
            if not does.publishes:
                return
            count = len(prompt) // does.block_size
            stored = BlockStored(
                block_hashes=[b"%d %d" % (len(self.held[rank]), n)
                              for n in range(count)],
                parent_block_hash=None,
                token_ids=prompt[: count * does.block_size],
                block_size=does.block_size,
                lora_id=None, lora_name=None, medium="GPU",
            )  # fmt: skip
            batch = KVEventBatch(ts=time.time(), events=[stored])
            payload = b"?" if does.strange else msgspec.msgpack.encode(batch)
            at = does.ranks - 1 - rank if does.swapped else rank
            # A real router hears no number twice.
            number = (len(self.held[rank]) - 1).to_bytes(8, "big")
            frames = [does.topic.encode(), number, payload]
            self._sockets[at].send_multipart(frames)


class RouterDouble(_Http):
    """Answers as vllm-router, and sends a prompt to where it is held.

    Args:
        servers: behind it.
        by_rank: whether it sends to each rank by itself.
        astray: whether it sends every prompt to the first server.
        in_turn: whether it sends to one server after the other.
        hashes: whether it sends a prompt where a hash of it says.
        workers: status of the page that lists them.
        more: entries of that page, besides.

    Attributes:
        prompts: that were sent to it.
    """

    def __init__(
        self,
        *servers,
        by_rank=False,
        astray=False,
        in_turn=False,
        hashes=False,
        workers=200,
        more=(),
    ):
        super().__init__()
        self.servers, self.by_rank, self.more = servers, by_rank, more
        self.astray, self.hashes, self.workers = astray, hashes, workers
        self.turns = itertools.cycle(servers) if in_turn else None
        self.prompts = []

    def answer(self, path, body, headers):
        if path == "/workers":
            named = [{"url": url} for url in self._urls()]
            return self.workers, {"workers": [*named, *self.more]}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        prompt = body["prompt"]
        self.prompts.append(prompt)
        if self.hashes:
            self.servers[sum(prompt) % len(self.servers)].complete(prompt, 0)
            return 200, {"choices": [{"text": "a"}]}
        if self.turns is not None:
            next(self.turns).complete(prompt, 0)
            return 200, {"choices": [{"text": "a"}]}
        for server in self.servers:
            for held in server.held:
                if prompt in held and not self.astray:
                    return 200, {"choices": [{"text": "a"}]}
        self.servers[0].complete(prompt, 0)
        return 200, {"choices": [{"text": "a"}]}

    def _urls(self):
        for server in self.servers:
            if self.by_rank:
                yield from (f"{server.url}@{n}" for n in range(server.behaviour.ranks))
            else:
                yield server.url
