"""report.json has a schema; the reports that tests make pages of are valid."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest

import vllm_radix_bench.ab
from support import ab_reports as reports

SCHEMA = json.loads(
    (Path(vllm_radix_bench.ab.__file__).parent / "report.schema.json").read_text()
)
VALIDATOR = jsonschema.Draft202012Validator(
    SCHEMA, format_checker=jsonschema.FormatChecker()
)
TIME = reports.ordinary()["workloads"][0]["times"]["ttft_mean"]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("make", reports.ALL.values(), ids=reports.ALL)
def test_reports_are_valid(make):
    VALIDATOR.validate(make())


def _without(*path):
    def change(report):
        for key in path[:-1]:
            report = report[key]
        del report[path[-1]]

    return change


def _with(value, *path):
    def change(report):
        for key in path[:-1]:
            report = report[key]
        report[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("sentence"), "'sentence' is a required property"),
        (
            _without("workloads", 0, "counts", "stock", "errors"),
            "'errors' is a required",
        ),
        (_with("vllm-radix/ab-report/2", "schema"), "'vllm-radix/ab-report/1' was exp"),
        (_with(1, "workloads", 0, "unheard_of"), "'unheard_of' was unexpected"),
        (_with("replay", "workloads", 0, "load"), "'replay' is not one of"),
        (_with(TIME, "workloads", 0, "times", "ttft_p42"), "'ttft_p42' does not match"),
        (
            _with([-1.0], "workloads", 0, "ttft_seconds", "stock"),
            "less than the minimum",
        ),
    ],
)
def test_what_is_wrong_is_found(change, said):
    report = copy.deepcopy(reports.ordinary())
    change(report)
    (error,) = VALIDATOR.iter_errors(report)
    assert said in error.message


def test_everything_is_described():
    """The page of the schema is made from what it says."""

    def fields(one):
        for name, field in one.get("properties", {}).items():
            yield name, field.get("description", "")
            yield from fields(field)

    objects = [SCHEMA, *SCHEMA["$defs"].values()]
    found = [pair for one in objects for pair in fields(one)]
    assert len(found) > 60
    assert [name for name, said in found if not said] == []
