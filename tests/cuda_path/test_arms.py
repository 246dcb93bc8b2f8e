"""What ``tools/gpu`` says of two arms' answers, and what its arms are started with."""

import arms
import pytest
import stage_smoke


def answer(*tokens, gap=1.0):
    """Return an answer's job result; at each token the second likeliest is ``gap``."""
    top = [[-0.5, -0.5 - gap] for _ in tokens]
    return {"outputs": [{"tokens": list(tokens), "top": top}]}


def compare(stock, other):
    requests = [{"id": name, "after": None} for name in "ab"]
    return arms.compare(stock, other, requests)


@pytest.mark.parametrize(("gap", "ties"), [(9e-4, 1), (2e-3, 0), (float("nan"), 0)])
def test_a_difference_is_kept_with_its_gap(gap, ties):
    stock = {"a": answer(3, 4, 5, gap=gap), "b": answer(6)}
    found = compare(stock, {"a": answer(3, 4, 7), "b": answer(6)})
    (one,) = found.pop("differences")
    assert (one["id"], one["token"]) == ("a", 2)
    assert one["gap"] == pytest.approx(gap, nan_ok=True)
    assert found == {"compared": 2, "ties": ties, "wrong": ["a"] * (1 - ties)}


def test_a_missing_or_shorter_answer_is_wrong_and_has_no_gap():
    stock = {"a": answer(3, 4), "b": answer(3)}
    found = compare(stock, {"a": answer(3, 4, 5)})
    assert found == {
        "compared": 1,
        "ties": 0,
        "wrong": ["a", "b"],
        "differences": [
            {"id": "a", "token": 2, "gap": None},
            {"id": "b", "token": None, "gap": None},
        ],
    }


@pytest.mark.parametrize("name", stage_smoke.BASE)
def test_the_smokes_arms_multiply_float32_exactly(name, monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    env = stage_smoke.settings(name, {})["env"]
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    assert knobs.language.fp32_default is None
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    assert knobs.language.fp32_default == "ieee"
