"""How a command ends: its exit codes, and what it says when it ends early."""

import sys
import tempfile
import traceback
from enum import IntEnum

from vllm_radix.extras import missing_extra


class ExitCode(IntEnum):
    """What a command ends with; a script can tell them apart."""

    GOOD = 0
    VERDICT = 1
    INPUT = 2
    ENGINE = 3
    OUTPUT = 4
    UNEXPECTED = 70
    INTERRUPTED = 130


EPILOG = (
    "exit status: 0 good; 1 a verdict: radix did not do what it should; 2 bad input; "
    "3 an engine did not come up or died; 4 the output could not be written where it "
    "was to be; 70 an unexpected error; 130 interrupted."
)
"""The codes, for ``--help``."""


class CommandError(Exception):
    """Ends a command with a sentence.

    Attributes:
        code: exit code.
        details: lines to show below the sentence.
    """

    code = ExitCode.UNEXPECTED

    def __init__(self, sentence: str, details: str = "") -> None:
        super().__init__(sentence)
        self.details = details


class StoppedError(Exception):
    """Says what a command that ended early has kept; ``__cause__`` says why it did."""


def say_why(prog: str, error: BaseException, debug: bool) -> ExitCode:
    """Say on standard error why a command ended early.

    Args:
        prog: the command, as the user called it.
        error: that ended it.
        debug: whether to show the traceback of an error that nobody expected;
            otherwise it goes to a file.

    Returns:
        The exit code.
    """
    kept = details = ""
    if isinstance(error, StoppedError) and error.__cause__ is not None:
        kept = f"; {error}"
        error = error.__cause__
    if isinstance(error, KeyboardInterrupt):
        code, sentence = ExitCode.INTERRUPTED, "interrupted"
    elif isinstance(error, CommandError):
        code, sentence, details = error.code, str(error), error.details
    elif isinstance(error, ModuleNotFoundError) and (hint := missing_extra(error)):
        code, sentence = ExitCode.INPUT, hint
    else:
        code = ExitCode.UNEXPECTED
        name = type(error).__name__
        # Messages of many lines, such as pydantic's, are in the traceback.
        said = next(iter(str(error).splitlines()), "")
        sentence = f"unexpected {name}: {said}" if said else f"unexpected {name}"
        text = "".join(traceback.format_exception(error))
        if not debug:
            where = _write_traceback(prog, text)
            if where is not None:
                text = ""
                sentence += f"; the traceback is in {where}, or shown with --debug"
        details = text
    print(f"{prog}: {sentence}{kept}", file=sys.stderr)
    if details:
        print(details.rstrip(), file=sys.stderr)
    return code


def _write_traceback(prog: str, text: str) -> str | None:
    """Return the new file with a traceback; None if none can be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w",
            prefix=prog.replace(" ", "-") + "-",
            suffix=".log",
            delete=False,
            encoding="utf-8",
        ) as file:
            file.write(text)
    except OSError:
        return None
    return file.name
