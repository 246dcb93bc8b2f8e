"""vLLM's own tests pass with our classes wherever they pass with vLLM's."""

from functools import cache

import pytest
from conformance import fetch, run
from conformance.run import Outcome

PASSED, FAILED = Outcome("passed"), Outcome("failed", "assert 1 == 2")


@cache
def arm(name):
    return run.run_arm(name, run.SUBSET)


@pytest.mark.engine
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", run.OURS)
def test_the_subset_ends_as_with_stock(name):
    reviewed = run.load_reviewed()[name]
    verdict = run.judge(arm(run.STOCK), arm(name), reviewed, everything=False)
    assert verdict.passed, run.describe(name, verdict)


@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_the_arms_are_what_they_say():
    built = {
        name: [one.ours for one in arm(name).outcomes.values() if one.ours]
        for name in (run.STOCK, *run.OURS)
    }
    assert not built.pop(run.STOCK)
    for name, ours in built.items():
        assert len(ours) > 200, f"{name} compares vLLM with itself"
        assert {one for classes in ours for one in classes} == {
            "RadixBlockPool",
            "LoneHybridKVCacheManager",
            "LoneKVCacheManager",
            "RadixScheduler",
            "AsyncRadixScheduler",
        }


# -- comparing -----------------------------------------------------------------


def verdict_of(stock, ours, reasons=(), **kwargs):
    return run.review(run.compare(stock, ours), dict.fromkeys(reasons, "why"), **kwargs)


def test_equal_outcomes_pass_whatever_they_are():
    assert verdict_of(
        {"a": PASSED, "b": FAILED, "c": Outcome("skipped", "no GPU")},
        {"a": PASSED, "b": Outcome("failed", "0x123"), "c": Outcome("skipped")},
    ).passed


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        ({"a": PASSED}, {"a": FAILED}),
        ({"a": FAILED}, {"a": PASSED}),
        ({"a": PASSED}, {"a": Outcome("error")}),
        ({"a": PASSED}, {"a": Outcome("skipped")}),
        ({"a": PASSED}, {}),
        ({}, {"a": PASSED}),
    ],
)
def test_another_outcome_is_new_until_reviewed(stock, ours):
    verdict = verdict_of(stock, ours)
    assert [one.test for one in verdict.new] == ["a"]
    assert not verdict.passed

    verdict = verdict_of(stock, ours, reasons=["a"])
    assert [one.test for one in verdict.reviewed] == ["a"]
    assert verdict.passed


def test_a_lost_test_is_named_as_such():
    verdict = verdict_of({"a": PASSED, "b": PASSED}, {"a": PASSED})
    assert verdict.new[0].ours.outcome == run.MISSING
    assert "NEW: b" in run.describe("mirrored", verdict)
    assert "stock passed, mirrored missing" in run.describe("mirrored", verdict)


def test_the_first_line_of_the_error_is_shown():
    text = run.describe("mirrored", verdict_of({"a": PASSED}, {"a": FAILED}))
    assert "assert 1 == 2" in text


def test_a_reviewed_test_that_does_not_differ_is_stale():
    verdict = verdict_of({"a": PASSED}, {"a": PASSED}, reasons=["a"])
    assert verdict.stale == ["a"]
    assert not verdict.passed
    assert "STALE: a" in run.describe("mirrored", verdict)


def test_a_reviewed_test_that_is_gone_is_stale():
    assert verdict_of({"a": PASSED}, {"a": PASSED}, reasons=["gone"]).stale == ["gone"]


def test_a_part_of_the_tests_says_nothing_of_the_others():
    same = {"a": PASSED}
    assert verdict_of(same, same, reasons=["b"], selected={"a"}).passed
    assert not verdict_of(same, same, reasons=["a"], selected={"a"}).passed


def test_the_reviewed_list_is_well_formed():
    assert set(run.load_reviewed()) == set(run.OURS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[nonsense]]\ntest = "a"\nreason = "b"', "'nonsense' is not one of"),
        ('[[mirrored]]\ntest = "a"', "a test and a reason"),
        ('[[mirrored]]\ntest = "a"\nreason = ""', "a test and a reason"),
        ('[[mirrored]]\ntest = "a"\nreason = "b"\n' * 2, "there twice"),
    ],
)
def test_a_malformed_list_is_refused(tmp_path, text, says):
    path = tmp_path / "reviewed.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        run.load_reviewed(path)


def test_an_entry_can_be_for_one_version(tmp_path):
    path = tmp_path / "reviewed.toml"
    entries = [("a", "0.32"), ("a", "0.33"), ("b", "0.33")]
    path.write_text(
        "".join(
            f'[[mirrored]]\ntest = "{test}"\nreason = "in {vllm}"\nvllm = "{vllm}"\n'
            for test, vllm in entries
        )
    )
    assert run.load_reviewed(path, "0.32.4")["mirrored"] == {"a": "in 0.32"}
    both = {"a": "in 0.33", "b": "in 0.33"}
    assert run.load_reviewed(path, "0.33.0")["mirrored"] == both


@pytest.mark.parametrize(
    "arguments",
    [["--arms", "nonsense"], ["--subset", "tests/v1/core"], ["--nonsense"]],
)
def test_bad_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("ours", "reasons", "status"),
    [
        ({"a": PASSED}, {}, 0),
        ({"a": FAILED}, {}, 1),
        ({"a": FAILED}, {"a": "why"}, 0),
        ({"a": PASSED}, {"a": "why"}, 1),
        ({}, {}, 1),
    ],
)
def test_the_exit_status_says_whether_the_differences_are_the_reviewed(
    monkeypatch, ours, reasons, status, capsys
):
    def run_arm(name, *args):
        outcomes = {"a": PASSED} if name == run.STOCK else ours
        return run.Arm(name, outcomes, seconds=1.0)

    monkeypatch.setattr(run, "run_arm", run_arm)
    monkeypatch.setattr(run, "load_reviewed", lambda **_: {"mirrored": reasons})
    assert run.main(["--arms", "mirrored"]) == status


@pytest.mark.parametrize("error", [run.ArmError, run.fetch.FetchError])
def test_an_arm_that_does_not_run_ends_with_1(monkeypatch, error, capsys):
    monkeypatch.setattr(run, "run_arm", raising(error("pytest ended with -11")))
    assert run.main([]) == 1
    assert "pytest ended with -11" in capsys.readouterr().out


def test_a_selection_of_nothing_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr(run, "run_arm", raising(run.SelectionError("no tests ran")))
    with pytest.raises(SystemExit) as ended:
        run.main(["tests/v1/core/nonsense.py"])
    assert ended.value.code == 2
    assert "no tests ran" in capsys.readouterr().err


def raising(error):
    def run_arm(*args):
        raise error

    return run_arm


# -- fetching ------------------------------------------------------------------


def source_of(folder, parts=fetch.PARTS):
    for part in parts:
        path = folder / "source" / part
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
        else:
            path.mkdir(parents=True)
            (path / "test_it.py").write_text("")
    return folder / "source"


def test_the_tests_are_fetched_once(monkeypatch, tmp_path):
    calls = []

    def download(wanted, scratch):
        calls.append(wanted)
        return source_of(scratch)

    monkeypatch.setattr(fetch, "_download", download)
    folder = fetch.fetch(tmp_path / "cache")
    assert fetch.fetch(tmp_path / "cache") == folder
    assert calls == [fetch.pinned_version()]
    assert "+" not in calls[0]
    assert (folder / "tests/v1/core/test_it.py").exists()
    assert not (folder / "vllm").exists()


def test_half_a_fetch_leaves_nothing_that_looks_whole(monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    monkeypatch.setattr(
        fetch, "_download", lambda _, scratch: source_of(scratch, fetch.PARTS[:-1])
    )
    with pytest.raises(fetch.FetchError, match=fetch.PARTS[-1]):
        fetch.fetch(cache)
    assert [path.name for path in cache.iterdir()] == [".gitignore"]


def test_a_version_that_does_not_exist_is_said_so(tmp_path):
    with pytest.raises(fetch.FetchError, match=r"vllm==0\.0\.nonsense"):
        fetch._download("0.0.nonsense", tmp_path)
