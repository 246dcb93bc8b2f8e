"""The trace on the disk: whole lines, a bounded file, and a server that goes on."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest

from vllm_radix.config import RadixConfig
from vllm_radix.record import EndedRequest, TraceWriter, path_problem
from vllm_radix.record import trace_writer as module
from vllm_radix.tree import encode

SALT = ("salt", "secret")


def ended(number, tokens=(1, 2, 3), **fields):
    key = encode(tokens)
    return EndedRequest(number, number / 8, key, len(tokens), 0, "stop", **fields)


def lines_of(path):
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.jsonl"


@pytest.fixture
def write(path):
    """Return a function that writes requests and returns the writer, closed."""

    def written(*requests, limit_mb=1, tokens=False):
        writer = TraceWriter(path, limit_mb, 10_000, {"server": {}}, tokens)
        for request in requests:
            writer.put(request)
        writer.close()
        return writer

    return written


def test_a_line_has_what_is_to_be_told_and_no_token(path, write):
    write(
        ended(0, range(20)),
        ended(1, [*range(12), 77], namespace=SALT, tenant="secret", priority=-2),
        ended(2, [*range(12), 78], cached=12),
        ended(3, [*range(12), 77], namespace=SALT, tenant="other"),
    )
    header, *lines = lines_of(path)
    assert header == {"vllm_radix_trace": 1, "server": {}}
    assert "secret" not in path.read_text()
    assert lines[0] == {
        "request": 0, "arrival": 0.0, "input_length": 20, "output_length": 0,
        "ended": "stop",
    }  # fmt: skip
    assert (lines[1]["priority"], "of" in lines[1]) == (-2, False)
    shared = {"of": 0, "shared": 12, "cached": 12}
    assert {name: lines[2][name] for name in shared} == shared
    assert lines[3]["salt"] == lines[1]["salt"] != lines[1]["tenant"]
    assert lines[3]["tenant"] != lines[1]["tenant"]
    assert (lines[3]["of"], lines[3]["shared"]) == (1, 13)


def test_what_shares_whole_blocks_only_is_told_so(path, write):
    write(
        ended(0, range(20)),
        ended(1, [*range(11), 77], plain=False, grain=4),
        ended(2, [*range(3), 77], plain=False, grain=4),
    )
    _, _, some, none = lines_of(path)
    assert (some["of"], some["shared"], "of" in none) == (0, 8, False)


def test_names_are_other_ones_in_each_file(path, write):
    salts = set()
    for _ in range(2):
        write(ended(0, namespace="user 7"))
        salts.add(lines_of(path)[1]["salt"])
    assert len(salts) == 2
    assert lines_of(path.with_name("t.jsonl.1"))[1]["salt"] in salts


def test_token_ids_are_written_if_asked_for_and_once_each(path, write):
    media = ended(2, [-1, 0, 5], plain=False)
    write(ended(0, [5, 6, 7]), ended(1, [5, 6, 9]), media, tokens=True)
    _, first, second, third = lines_of(path)
    assert (first["new_ids"], second["new_ids"]) == ([5, 6, 7], [9])
    assert "new_ids" not in third, "markers of media are no token ids"


def test_a_full_file_is_kept_as_one_older_and_each_stands_alone(
    path, write, monkeypatch
):
    monkeypatch.setattr(module, "_MEGABYTE", 2000)
    requests = [ended(i, [*range(100), i]) for i in range(60)]
    write(*requests)
    older = path.with_name("t.jsonl.1")
    assert {p.name for p in path.parent.iterdir()} == {path.name, older.name}
    numbers = []
    for file in (older, path):
        header, *lines = lines_of(file)
        assert "vllm_radix_trace" in header
        assert file.stat().st_size < 2000 + 200
        assert "of" not in lines[0] and all("of" in line for line in lines[1:])
        assert {line["of"] for line in lines[1:]} <= {line["request"] for line in lines}
        numbers += [line["request"] for line in lines]
    assert numbers == list(range(numbers[0], 60))


def test_what_a_slow_disk_leaves_no_room_for_is_dropped_counted_and_said(
    path, monkeypatch, caplog
):
    monkeypatch.setattr(module, "_MAX_QUEUED_BYTES", 2000)
    held = []
    writer = TraceWriter(path, 1, 10_000, {"server": {}})
    write = writer._write

    def slow(request):
        while not held:
            time.sleep(0.01)
        write(request)

    writer._write = slow
    with caplog.at_level(logging.INFO, "vllm.radix"):
        for number in range(50):
            writer.put(ended(number))
        assert 0 < writer.num_dropped < 50
        held.append(True)
        writer.close()
    _, *lines = lines_of(path)
    assert len(lines) + writer.num_dropped == 50
    assert sum(line.get("dropped", 0) for line in lines) == writer.num_dropped
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1 and "falls behind" in said[0]
    assert f"dropped: {writer.num_dropped}" in caplog.text


def check_that_it_stops_with_one_line(writer, caplog):
    """Write until it stops; nothing is raised, and one line is logged."""
    with caplog.at_level(logging.INFO, "vllm.radix"):
        for number in range(2000):
            writer.put(ended(number, range(number, number + 900)))
        writer._thread.join(30)
        writer.put(ended(0))
        writer.close()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    return record.getMessage()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kilobytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_trace_with_whole_lines(small_disk, caplog):
    path = small_disk / "t.jsonl"
    writer = TraceWriter(path, 1, 10_000_000, {"server": {}}, tokens=True)
    said = check_that_it_stops_with_one_line(writer, caplog)
    assert "No space left on device" in said and "serving goes on" in said
    _, *lines = lines_of(path)
    assert [line["request"] for line in lines] == list(range(len(lines)))


def test_a_line_of_which_a_part_was_written_is_taken_back(path, caplog, monkeypatch):
    writer = TraceWriter(path, 1, 10_000_000, {"server": {}})
    write, left = os.write, [1000]

    def full(descriptor, data):
        if descriptor != writer._file._descriptor:
            return write(descriptor, data)
        if not left[0]:
            raise OSError(28, "No space left on device")
        done = write(descriptor, data[: left[0]])
        left[0] -= done
        return done

    monkeypatch.setattr(os, "write", full)
    assert "No space left" in check_that_it_stops_with_one_line(writer, caplog)
    _, *lines = lines_of(path)
    assert len(lines) > 3


DYING = """
import os, sys
from pathlib import Path
from vllm_radix.record import EndedRequest, TraceWriter
from vllm_radix.tree import encode
writer = TraceWriter(Path(sys.argv[1]), 1, 10_000, {"server": {}})
for number in range(5000):
    writer.put(EndedRequest(number, 0.0, encode([number]), 1, 0, "stop"))
if sys.argv[2] == "killed":
    while writer._file._size < 20_000:
        pass
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_a_process_that_ends_leaves_whole_lines(path, how):
    command = [sys.executable, "-c", DYING, str(path), how]
    code = subprocess.run(command).returncode
    _, *lines = lines_of(path)
    assert [line["request"] for line in lines] == list(range(len(lines)))
    assert (code, len(lines) == 5000) == ((0, True) if how == "ends" else (-9, False))


def test_paths_that_are_no_place_for_a_trace_are_named(tmp_path, path, write):
    write(ended(0))
    write(ended(0))
    assert path_problem(str(path)) is None, "an earlier trace is moved aside"
    other = tmp_path / "notes.txt"
    other.write_text("my notes\n")
    for wrong, words in (
        (tmp_path, "is a folder: name a file in it"),
        (tmp_path / "no" / "t.jsonl", "is in no folder that is there: make "),
        (other, "holds something else than a trace"),
        ("a\0b", "is no path of a file"),
        ("a" * 300, "cannot be written: File name too long"),
    ):
        with pytest.raises(ValueError, match=r"^radix option 'record': ") as raised:
            RadixConfig(record=str(wrong))
        assert words in str(raised.value)
    assert other.read_text() == "my notes\n"
    path.with_name("t.jsonl.1").write_text("my notes\n")
    with pytest.raises(ValueError, match=r"t\.jsonl\.1' holds something else"):
        RadixConfig(record=str(path))


def test_a_folder_that_is_read_only_is_named(path, monkeypatch):
    # To root none is.
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != path.parent)
    assert path_problem(str(path)).endswith(
        "t.jsonl' cannot be written, for its folder is read-only"
    )
