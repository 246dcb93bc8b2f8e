"""The overlay is made once, also where several tests want it at the same time."""

import time
from concurrent.futures import ThreadPoolExecutor

import overlay


def test_others_wait_for_the_one_that_makes_it(tmp_path, monkeypatch):
    made = []

    def make(target):
        made.append(target)
        target.mkdir()
        time.sleep(0.2)

    monkeypatch.setattr(overlay, "make_overlay", make)
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: overlay.cached_overlay(tmp_path), range(4)))
    assert found == {tmp_path / "overlay"} == set(made)
    assert len(made) == 1
    (tmp_path / "overlay.key").write_text("of another version")
    (tmp_path / "overlay").rmdir()
    overlay.cached_overlay(tmp_path)
    assert len(made) == 2
