"""The arms of the tier: each is started once, when a test first asks it something."""

import json
from typing import Any

import arms
import pytest
from cuda_path.jobs import ENGINE, JOBS
from cuda_path.model import make_model

from support.pretended_gpu import INSTALL, environment, plain_attention

ARMS = {
    "stock sync": {"async": False, "radix": None},
    "radix sync": {"async": False, "radix": {}},
    "stock": {"async": True, "radix": None},
    "radix": {"async": True, "radix": {}},
    "grouped": {"async": True, "radix": {"attention": "grouped"}},
}


class Engines:
    """Real engines on the pretended GPU, and what they have said so far."""

    def __init__(self, model: str, logs: Any) -> None:
        self._model, self._logs = model, logs
        self._up: dict[str, arms.Arm] = {}
        self._said: dict[str, Any] = {}

    def arm(self, name: str) -> arms.Arm:
        """Return a running arm."""
        if name not in self._up:
            settings = {
                "engine": {
                    **ENGINE,
                    "model": self._model,
                    "async_scheduling": ARMS[name]["async"],
                },
                "radix": ARMS[name]["radix"],
                "before": [INSTALL, plain_attention.INSTALL],
            }
            arm = arms.Arm(name, settings, self._logs, environment())
            self._up[name] = arm
            arm.wait(180)
        return self._up[name]

    def ask(self, name: str, job: str | dict[str, Any]) -> dict[str, Any]:
        """Return an arm's result of a job, or of one by its name; asked once."""
        made = JOBS[job]() if isinstance(job, str) else job
        key = f"{name} {json.dumps(made)}"
        if key not in self._said:
            made = {**made, "attention": name == "grouped"}
            self._said[key] = self.arm(name).ask(made, seconds=400)
        return self._said[key]

    def stop(self) -> None:
        """End all arms."""
        for arm in self._up.values():
            arm.stop()


@pytest.fixture(scope="package")
def model(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="package")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="package")
def engines(model, logs):
    made = Engines(model, logs)
    yield made
    made.stop()
