"""Progress: a bar on a terminal only, which shows how long the rest takes."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from vllm_radix_bench.report.progress import Progress, seconds_in_words

WHAT = "counts: documents at 4.0x, radix, run 1 of 3"


def work(progress):
    progress.begin(WHAT)
    progress.advance()
    progress.finish(f"{WHAT}: 12 s", "about 12 min to go; then the texts")
    progress.begin(WHAT)
    progress.close()


def test_without_a_terminal_each_finished_piece_is_a_line(capsys):
    work(Progress(24, "pieces"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"{WHAT}: 12 s; about 12 min to go; then the texts\n"


@pytest.mark.parametrize("width", (60, 80))
def test_on_a_narrow_terminal_the_estimate_is_seen(width):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    code = "from bench.report.test_progress import Progress, work\n"
    code += "work(Progress(24, 'pieces', 5))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, env=env, check=True)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode().split("\r")
    os.close(ours)
    assert any("6/24 pieces [00:00, about 12 min to go" in line for line in shown)
    assert all(len(line.strip("\n")) <= width for line in shown)
    assert shown[-1].strip() == "", "the bar stays behind"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (5900, "98 min"), (7000, "1.9 h")],
)
def test_seconds_are_told_as_a_reader_says_them(seconds, words):
    assert seconds_in_words(seconds) == words
