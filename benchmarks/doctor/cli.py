"""Say whether a server will start with radix, and what to do if not.

Looks at what is installed, at the environment and, given a model, at its configuration
with the options of `vllm serve`. No weights are loaded, and no GPU is needed.
`--router URL` looks at a router and the servers behind it instead; then see its --help.
"""

import argparse
from collections.abc import Iterator, Sequence
from types import ModuleType

from vllm_radix.exits import ExitCode
from vllm_radix_bench.doctor.finding import Finding, starts
from vllm_radix_bench.doctor.table import count_problems, print_json, print_table
from vllm_radix_bench.report.cli_types import InputError
from vllm_radix_bench.report.quiet import quiet_vllm


def variant(words: Sequence[str]) -> ModuleType | None:
    """Return the module that serves these words, if it is not this one."""
    if not any(word.partition("=")[0] == "--router" for word in words):
        return None
    from vllm_radix_bench.doctor import router_cli

    return router_cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, and what runs the command."""
    parser.description = __doc__
    parser.usage = (
        "vllm-radix doctor [--json] [MODEL [options of vllm serve]]\n"
        "       vllm-radix doctor --router URL [--help]"
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON instead of a table")
    add("model", nargs="?", metavar="MODEL", help="as for vllm serve")
    add(
        "options",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="of vllm serve, those of radix among them",
    )


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the command.

    Returns:
        The exit code: that of a verdict where a server does not start with radix.
    """
    quiet_vllm()
    own = {"--json", "--debug"}
    options = [word for word in arguments.options if word not in own]
    as_json = arguments.json or "--json" in arguments.options
    from vllm_radix_bench.sim.model_layouts import silence

    try:
        with silence():
            findings = [*_findings(arguments.model, options, parser)]
    except InputError as error:
        parser.error(str(error))
    good = starts(findings)
    if as_json:
        print_json(findings, starts=good)
    else:
        print_table(findings, _verdict(findings, arguments.model, good))
    return ExitCode.GOOD if good else ExitCode.VERDICT


def _findings(
    model: str | None, options: Sequence[str], parser: argparse.ArgumentParser
) -> Iterator[Finding]:
    """Yield all findings; those that would need what is missing are left out."""
    from vllm_radix_bench.doctor import installation

    found = [*installation.versions()]
    yield from found
    yield from installation.plugin()
    environment = [*installation.environment()]
    yield from environment
    if not starts(found):
        return
    yield from installation.patches()
    yield from installation.devices()
    if model is None or not starts(environment):
        return
    from vllm_radix_bench.doctor.model import engine_args, examine

    yield from examine(engine_args(model, options, parser.error))


def _verdict(findings: Sequence[Finding], model: str | None, good: bool) -> str:
    """Return the sentence below the table."""
    if not good:
        why = f"{count_problems(findings)}, see above"
        return f"A server does not start with radix: {why}."
    if model is None:
        return "Radix can be used here. Name a model to have it looked at, too."
    return f"A server of {model} starts with radix."
