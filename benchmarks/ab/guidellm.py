"""The requests of GuideLLM, sent by it: a program in an environment of its own.

GuideLLM is no dependency: ab starts it as a command, gives it a scenario file with what
ab chooses, and reads the requests in its report.
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vllm_radix_bench.ab import supervise
from vllm_radix_bench.ab.client import Answer, Sending
from vllm_radix_bench.ab.offline.process import excerpt
from vllm_radix_bench.ab.servers import HOST, Server, ServerError, free_port
from vllm_radix_bench.report.cli_types import InputError

SERIES = "0.8"
"""Versions of GuideLLM that are known: its options and its report change with it."""
INSTALL = "pip install guidellm==0.8.1, in an environment of its own"
REPORT_VERSION = 2

_OURS = {
    "--output": "results are in --output of ab",
    "--tokenizer": "it is that of the servers",
    "--config": "ab gives it one of its own",
    "--scenario": "ab gives it one of its own",
    "-c": "ab gives it one of its own",
}
"""Options of GuideLLM that an A/B sets, and why."""
_BACKEND_OURS = {
    "target": "ab knows its servers",
    "model": "it is that of the servers",
    "api_key": "it is that of the servers",
}
_BY_SPEED = {
    "--profile": ("sweep", "goodput", "knee"),
    "--constraint": ("max_duration", "over_saturation"),
}
"""Kinds with which what is sent depends on how fast a server is."""
_WRONG_OPTIONS = 2
"""Exit status of GuideLLM that refuses its options."""


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each option."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            yield name, value if equals else after
        elif word.startswith("-"):
            yield word[:2], word[2:] or after


def _fields(name: str, value: str) -> dict[str, str]:
    """Return what an option's value sets: ``key=value,...`` or an object of JSON.

    Raises:
        InputError: it begins like an object and is none.
    """
    if not value.lstrip().startswith("{"):
        pairs = (pair.partition("=") for pair in value.split(","))
        found = {key: given for key, _, given in pairs}
    else:
        try:
            found = json.loads(value)
        except ValueError as error:
            raise InputError(
                f"guidellm run: {name}: {value!r} is neither JSON nor key=value,... "
                f"({error})"
            ) from error
    return {
        key.strip().replace("-", "_"): str(given).strip()
        for key, given in found.items()
    }


def check_words(words: Sequence[str], arguments: argparse.Namespace) -> None:
    """Check options of GuideLLM as far as an A/B depends on them.

    Args:
        words: the options.
        arguments: of ab.

    Raises:
        InputError: one is ab's to choose, or both arms would get other requests.
    """
    given = [(name, _fields(name, value)) for name, value in _options(words)]
    names = {name for name, _ in given}
    for name, why in _OURS.items():
        if name in names:
            raise InputError(f"guidellm run: {name}: leave it away: {why}")
    for name, fields in given:
        kind = fields.get("kind", "")
        if kind in _BY_SPEED.get(name, ()):
            raise InputError(
                f"guidellm run: {name}: with {kind} a faster server gets other "
                "requests; an A/B needs the same for both"
            )
        if name == "--backend":
            for field, why in _BACKEND_OURS.items():
                if field in fields:
                    raise InputError(f"guidellm run: {name}: leave {field} away: {why}")
            if kind and kind != "openai_http":
                raise InputError(
                    f"guidellm run: {name}: {kind!r} is not openai_http, which is how "
                    "ab's servers are asked"
                )
    constrained = {f.get("kind") for name, f in given if name == "--constraint"}
    synthetic = any(
        name == "--data" and fields.get("kind", "").startswith("synthetic_")
        for name, fields in given
    )
    if synthetic and "max_requests" not in constrained:
        raise InputError(
            "guidellm run: synthetic data has no end: add --constraint "
            "kind=max_requests,count=N"
        )
    if "--profile" in names:
        for option in ("rate", "matrix_rate", "concurrency"):
            if getattr(arguments, option) is not None:
                raise InputError(
                    f"--{option.replace('_', '-')} and guidellm's --profile: give one "
                    "of them"
                )


def find() -> str:
    """Return the path of the program.

    Raises:
        InputError: there is none.
    """
    named = os.environ.get("GUIDELLM")
    program = shutil.which(named or "guidellm")
    if program is None:
        where = f"{named}, named by $GUIDELLM," if named else "guidellm"
        raise InputError(
            f"--load guidellm: the program {where} is not there: {INSTALL}, then put "
            "it on PATH or name it in $GUIDELLM"
        )
    return program


def version_of(program: str) -> str:
    """Return the version of the program.

    Raises:
        InputError: it is none that is known.
    """
    try:
        told = subprocess.run([program, "--version"], capture_output=True, text=True)
        found = re.search(r"guidellm\D*(\d+\.\S+)", told.stdout)
    except OSError:
        found = None
    version = found[1] if found else ""
    if not f"{version}.".startswith(f"{SERIES}."):
        raise InputError(
            f"--load guidellm: {program} is version {version or 'unknown'}, and ab "
            f"knows {SERIES}: {INSTALL}"
        )
    return version


def _error_of(output: str) -> str:
    """Return what GuideLLM says of options that it refuses, as a line."""
    text = output.rpartition("Error:")[2] or output
    return " ".join(text.split())


def _try(program: str, words: Sequence[str], tokenizer: str) -> None:
    """Let GuideLLM read its options: it does so before it asks a server.

    Raises:
        InputError: it refuses them.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-radix-guidellm-") as folder:
        nowhere = f"http://{HOST}:{free_port()}"
        scenario = scenario_of(nowhere, "none", None, tokenizer, Sending(), folder)
        done = subprocess.run(
            command(program, scenario, words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=_environment(tokenizer),
        )
    if done.returncode == _WRONG_OPTIONS:
        raise InputError(f"guidellm run: {_error_of(done.stdout)}")


def _environment(tokenizer: str) -> dict[str, str]:
    """Return the environment, as servers have it."""
    loaded = dict(os.environ)
    if os.path.isdir(tokenizer):
        loaded.setdefault("HF_HUB_OFFLINE", "1")
    return loaded


def scenario_of(
    base_url: str,
    model: str,
    api_key: str | None,
    tokenizer: str,
    sending: Sending,
    folder: str,
) -> Path:
    """Write the scenario file with what ab chooses; options overrule it.

    Args:
        base_url: of the server.
        model: by which requests name it.
        api_key: that the server asks for; None for none.
        tokenizer: folder or name.
        sending: with the seed.
        folder: where it is written, and GuideLLM's report, ``report.json``.

    Returns:
        The file.
    """
    backend = {"kind": "openai_http", "target": base_url, "model": model}
    spec: dict[str, Any] = {
        "backend": {**backend, "extras": {"body": {"temperature": 0}}},
        "tokenizer": {"kind": "huggingface_auto", "model": str(tokenizer)},
        "seed": {"kind": "static", "value": sending.seed},
        "outputs": [{"kind": "json", "path": str(Path(folder, "report.json"))}],
    }
    if api_key is not None:
        spec["backend"]["api_key"] = api_key
    path = Path(folder, "scenario.json")
    path.write_text(json.dumps({"spec": spec}))
    return path


def _profile(sending: Sending) -> str:
    """Return the profile that sends as ab does."""
    profile: dict[str, Any] = {"kind": "throughput"}
    if sending.rate is not None:
        profile = {"kind": "poisson", "rate": sending.rate}
    return json.dumps({**profile, "max_concurrency": sending.concurrency})


def command(
    program: str, scenario: Path, words: Sequence[str], sending: Sending | None = None
) -> list[str]:
    """Return the words that run GuideLLM.

    Args:
        program: its path.
        scenario: the file with what ab chooses.
        words: of the user.
        sending: how requests are sent, if no ``--profile`` says so.
    """
    run = [program, "run", "--config", str(scenario), *words]
    if not any(name == "--profile" for name, _ in _options(words)):
        run += ["--profile", _profile(sending or Sending())]
    return [*run, "--disable-console-interactive"]


@dataclass
class GuideLLM:
    """The requests of GuideLLM, sent by it.

    Attributes:
        words: options of ``guidellm run``.
        log: file for what it prints.
        tokenizer: folder or name.
    """

    words: tuple[str, ...]
    log: Path
    tokenizer: str
    kind: ClassVar[str] = "guidellm"
    is_control: ClassVar[bool] = False
    fewest_tokens: ClassVar[int | None] = None

    @classmethod
    def check(
        cls, words: Sequence[str], arguments: argparse.Namespace, tokenizer: str
    ) -> dict[str, str]:
        """Check its options, and that the program is there; return its version.

        Raises:
            InputError: they cannot be used, or it cannot.
        """
        check_words(words, arguments)
        program = find()
        version = version_of(program)
        _try(program, words, tokenizer)
        return {"guidellm": version}

    @property
    def name(self) -> str:
        """Return the kind of its data."""
        for name, value in _options(self.words):
            if name == "--data":
                return f"guidellm: {_fields(name, value).get('kind', 'data')}"
        return "guidellm"

    @property
    def what(self) -> str:
        """Return the options as they were given."""
        return "guidellm run " + " ".join(self.words)

    async def send(self, server: Server, sending: Sending) -> list[Answer]:
        """Let GuideLLM send all requests; return their answers.

        Raises:
            InputError: it refuses its options.
            ServerError: it failed.
        """
        with tempfile.TemporaryDirectory(prefix="vllm-radix-guidellm-") as folder:
            scenario = scenario_of(
                server.base_url,
                server.model_name,
                server.spec.api_key,
                self.tokenizer,
                sending,
                folder,
            )
            run = command(find(), scenario, self.words, sending)
            status = await self._run(run)
            if status == _WRONG_OPTIONS:
                raise InputError(f"guidellm run: {_error_of(self.log.read_text())}")
            if status:
                raise self._error(f"ended with exit status {status}")
            try:
                report = json.loads(Path(folder, "report.json").read_text())
                found = answers_of(report)
            except (OSError, ValueError, KeyError, TypeError) as error:
                what = f"{type(error).__name__}: {error}"
                raise self._error(f"left no report that ab reads ({what})") from error
        if not found:
            raise self._error("sent no request")
        return found

    def _error(self, what: str) -> ServerError:
        log = self.log.read_text(errors="replace")
        return ServerError(f"guidellm {what}; its log is {self.log}", excerpt(log))

    async def _run(self, words: Sequence[str]) -> int:
        """Run a command; end it and all that it started if this is cancelled.

        Returns:
            Its exit status.
        """
        reading, writing = os.pipe()
        try:
            with self.log.open("w") as sink:
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", supervise.__file__, str(reading)),
                    *words,
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    env=_environment(self.tokenizer),
                    pass_fds=[reading],
                    start_new_session=True,
                )
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        try:
            return await process.wait()
        finally:
            os.close(writing)
            await process.wait()

    def close(self) -> None:
        """Do nothing: no process outlives ``send``."""


def answers_of(report: Mapping[str, Any]) -> list[Answer]:
    """Return the answers in a report of GuideLLM.

    A request's id comes of all that was sent, as the ids of GuideLLM are drawn anew in
    each run. Outputs are characters' numbers, not tokens: equal texts are equal lists.

    Raises:
        ValueError: it is of another version.
        KeyError: it lacks a field.
    """
    version = report["metadata"]["version"]
    if version != REPORT_VERSION:
        raise ValueError(f"its version is {version}, not {REPORT_VERSION}")
    seen: Counter[str] = Counter()
    out = []
    for benchmark in report["benchmarks"]:
        for status in ("successful", "errored", "incomplete"):
            for request in benchmark["requests"][status] or ():
                answer = _answer(request, status)
                seen[answer.id] += 1
                answer.id += f"-{seen[answer.id]}"
                out.append(answer)
    return out


def _answer(request: Mapping[str, Any], status: str) -> Answer:
    """Return the answer to a request."""
    sent = request["request_args"]
    name = hashlib.sha256(sent.encode()).hexdigest() if sent else request["request_id"]
    answer = Answer(name, prompt_tokens=request["input_metrics"]["total_tokens"] or 0)
    if status != "successful":
        said = request["info"]["error"] or "GuideLLM ended before it was answered"
        # It quotes exceptions: their line ends are written out.
        answer.error = said.replace("\\n", "\n").splitlines()[0][:200]
        return answer
    timings = request["info"]["timings"]
    first, last = timings["first_token_iteration"], timings["last_token_iteration"]
    if first is None:
        answer.error = "no token came"
        return answer
    answer.sent = timings["request_start"]
    answer.ttft, answer.e2e = first - answer.sent, last - answer.sent
    tokens = request["output_metrics"]["total_tokens"] or timings["token_iterations"]
    if tokens > 1:
        answer.tpot = (last - first) / (tokens - 1)
    text = (request["reasoning_output"] or "") + (request["output"] or "")
    answer.output = [ord(character) for character in text]
    return answer
