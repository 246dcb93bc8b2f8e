"""The servers of an A/B: ``vllm serve``, once without the plugin and once with it."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import psutil

from vllm_radix.exits import CommandError, ExitCode
from vllm_radix_bench.ab import supervise
from vllm_radix_bench.ab.offline.process import excerpt, how_it_ended
from vllm_radix_bench.ab.web import HttpError, bearer, get, get_json, post
from vllm_radix_bench.report.output import OutputError
from vllm_radix_bench.report.quiet import users_environment

ARMS = ("stock", "radix")
HOST = "127.0.0.1"
PLUGIN = "radix"
_POLL_SECONDS = 0.25
_RESET_SECONDS = 30.0


class ServerError(CommandError):
    """A server did not come up, died or does not answer."""

    code = ExitCode.ENGINE


@dataclass(frozen=True)
class ServerSpec:
    """How to start a server.

    Attributes:
        arm: ``stock`` or ``radix``.
        model: as given to ``vllm serve``.
        options: words after it; the same for both arms, but for what turns radix on.
        api_key: that the server asks for; None for none.
    """

    arm: str
    model: str
    options: tuple[str, ...]
    api_key: str | None = None

    def command(self, port: int) -> list[str]:
        """Return the words that start the server on a port."""
        where = ["--host", HOST, "--port", str(port)]
        vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
        return [*vllm, "serve", self.model, *self.options, *where]

    def environment(self) -> dict[str, str]:
        """Return the environment: in the stock arm the plugin is not even loaded."""
        loaded = users_environment()
        loaded["VLLM_PLUGINS"] = ",".join(plugins_of(self.arm, os.environ))
        # For POST /reset_prefix_cache; both arms have it.
        loaded["VLLM_SERVER_DEV_MODE"] = "1"
        return loaded


def plugins_of(arm: str, environment: Mapping[str, str]) -> list[str]:
    """Return the plugins that vLLM is to load: the user's, without radix in stock.

    Where the user names none, all that vLLM would load by itself.
    """
    named = environment.get("VLLM_PLUGINS")
    if named is None:
        # vLLM loads endpoint plugins only by name.
        names = {
            entry.name
            for group in entry_points().groups
            if group.startswith("vllm.") and "endpoint" not in group
            for entry in entry_points(group=group)
        }
    else:
        names = {name.strip() for name in named.split(",")} - {""}
    names.discard(PLUGIN)
    return sorted(names | {PLUGIN}) if arm == "radix" else sorted(names)


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Cache:
    """What a server's KV cache holds.

    Attributes:
        blocks: of all its engines.
        block_size: tokens in a block.
        tokens: that fit; with several cache groups fewer than all blocks would hold.
    """

    blocks: int
    block_size: int
    tokens: int


@dataclass
class Server:
    """A running server.

    Attributes:
        spec: how it was started.
        port: that it listens on.
        log: file with everything that it prints.
        cache: its KV cache, once it is ready.
        max_model_len: the longest request, in tokens, once it is ready.
        model_name: by which requests name the model, once it is ready.
        dtype: of the model, once it is ready; empty if its log does not tell.
        engines: that it has, once it is ready.
    """

    spec: ServerSpec
    port: int
    log: Path
    cache: Cache = field(default_factory=lambda: Cache(0, 0, 0))
    max_model_len: int = 0
    model_name: str = ""
    dtype: str = ""
    engines: int = 1

    def __post_init__(self) -> None:
        try:
            sink = self.log.open("w")
        except OSError as error:
            raise OutputError(
                f"--output: the log {self.log} beside it cannot be written "
                f"({error.strerror})"
            ) from error
        reading, self._pipe = os.pipe()
        # Isolated: its folder must not stand in for the standard library.
        command = [sys.executable, "-I", supervise.__file__, str(reading)]
        with sink:
            self._process = subprocess.Popen(
                [*command, *self.spec.command(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=self.spec.environment(),
                pass_fds=[reading],
                start_new_session=True,
            )
        os.close(reading)

    @property
    def arm(self) -> str:
        """The arm that it serves."""
        return self.spec.arm

    @property
    def base_url(self) -> str:
        """Where it is."""
        return f"http://{HOST}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        """What each request carries."""
        return bearer(self.spec.api_key)

    def error(self, what: str) -> ServerError:
        """Return an error of this server, with what its log has of errors."""
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        sentence = f"the {self.arm} server {what}; its log is {self.log}"
        return ServerError(sentence, excerpt(log))

    def check_alive(self) -> None:
        """Check that it runs.

        Raises:
            ServerError: it does not.
        """
        status = self._process.poll()
        if status is not None:
            if status > supervise.SIGNALLED:
                status = supervise.SIGNALLED - status
            raise self.error(how_it_ended(status))

    def wait_until_ready(self, seconds: float) -> None:
        """Wait until it serves, and learn what it is.

        Raises:
            ServerError: it ended, is not ours, or was not ready in time.
        """
        deadline = time.monotonic() + seconds
        while not self._answers():
            self.check_alive()
            if time.monotonic() > deadline:
                raise self.error(
                    f"was not ready after {seconds:.0f} s (--ready-timeout)"
                )
            time.sleep(_POLL_SECONDS)
        self._check_that_it_is_ours()
        self._learn()

    def _processes(self) -> list[psutil.Process]:
        """Return its processes."""
        own = psutil.Process(self._process.pid)
        return [own, *own.children(recursive=True)]

    def _answers(self) -> bool:
        with suppress(HttpError):
            get(f"{self.base_url}/health", timeout=5)
            return True
        return False

    def _check_that_it_is_ours(self) -> None:
        """Check that nobody else's server answers.

        Raises:
            ServerError: it does.
        """
        for process in self._processes():
            with suppress(psutil.Error):
                if any(c.laddr.port == self.port for c in process.net_connections()):
                    return
        raise self.error(f"does not listen on port {self.port}: another one answers")

    def _learn(self) -> None:
        from vllm_radix_bench.ab.scrape import scrape

        try:
            model = get_json(f"{self.base_url}/v1/models", self.headers)["data"][0]
            counted = scrape(self)
            infos = counted.labels_of("vllm:cache_config_info")
        except (HttpError, KeyError, IndexError) as error:
            raise self.error(f"does not tell what it is ({error})") from error
        if not infos:
            raise self.error("has no metrics: start without --disable-log-stats")
        # With several engines each tells the blocks of all.
        blocks = max(int(info["num_gpu_blocks"]) for info in infos)
        size, self.engines = int(infos[0]["block_size"]), len(infos)
        known = [info.get("kv_cache_size_tokens", "None") for info in infos]
        tokens = [int(text) for text in known if text not in ("None", "0")]
        whole = len(tokens) == len(infos)
        self.cache = Cache(blocks, size, sum(tokens) if whole else blocks * size)
        self.model_name = str(model["id"])
        self.max_model_len = int(model["max_model_len"])
        log = self.log.read_text(errors="replace")
        dtype = re.search(r"\bdtype=torch\.(\w+)", log)
        self.dtype = dtype[1] if dtype else ""
        # The log may be kept silent, and metrics come with the first request.
        announced = "vllm-radix " in log or counted.has("vllm_radix:")
        if announced != (self.arm == "radix"):
            raise self.error(
                "has loaded vllm-radix"
                if announced
                else "runs without radix: see what its log says of it"
            )

    def reset_cache(self) -> None:
        """Empty the prefix cache, once the blocks of the last requests are free.

        Raises:
            ServerError: it could not.
        """
        deadline = time.monotonic() + _RESET_SECONDS
        while True:
            try:
                reply = post(f"{self.base_url}/reset_prefix_cache", self.headers)
            except HttpError as error:
                self.check_alive()
                raise self.error(f"did not reset its prefix cache ({error})") from error
            if not reply.strip() or json.loads(reply).get("success", True):
                return
            if time.monotonic() > deadline:
                raise self.error("did not reset its prefix cache: blocks are in use")
            time.sleep(_POLL_SECONDS)

    def memory(self) -> int:
        """Return the bytes of memory that its processes hold for themselves."""
        total = 0
        for process in self._processes():
            with suppress(psutil.Error):
                total += process.memory_full_info().uss
        return total

    def stop(self) -> None:
        """End it and all that it started."""
        with suppress(OSError):
            os.close(self._pipe)
        # The supervisor ends by itself, even if this wait is interrupted.
        self._process.wait()


@contextmanager
def running(spec: ServerSpec, logs: Path, ready_seconds: float) -> Iterator[Server]:
    """Start a server, wait until it is ready, end it in any case.

    Args:
        spec: how it is started.
        logs: path that its log's begins with.
        ready_seconds: that it may take.

    Raises:
        ServerError: it did not come up.
    """
    log = logs.with_name(f"{logs.name}-{spec.arm}.log")
    server = Server(spec, free_port(), log)
    try:
        server.wait_until_ready(ready_seconds)
        yield server
    finally:
        server.stop()


def radix_words(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words that turn radix on."""
    return ("--radix", json.dumps(dict(options)))
