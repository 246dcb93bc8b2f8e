import dataclasses

import pytest

from vllm_radix.config import RadixConfig, parse_flag


def test_defaults_environment_and_explicit_options_in_that_order():
    assert RadixConfig.resolve({}, {}) == RadixConfig()
    environ = {"RADIX_POLICY": "fcfs", "RADIX_MAX_OVERTAKES": "7"}
    assert RadixConfig.resolve({}, environ).policy == "fcfs"
    both = RadixConfig.resolve({"policy": "prefix"}, environ)
    assert (both.policy, both.max_overtakes) == ("prefix", 7)


def test_options_come_from_additional_config():
    options = {"radix": {"max_overtakes": 3}, "other": 1}
    assert RadixConfig.from_additional_config(options).max_overtakes == 3
    assert RadixConfig.from_additional_config({}) == RadixConfig()
    assert RadixConfig.from_additional_config(None) == RadixConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": "prefix"}, "unknown radix option 'polcy'; options: policy, pat"),
        ({"policy": "sjf"}, "'policy': 'sjf' is not one of 'prefix', 'fcfs'"),
        ({"patience": -0.1}, "'patience': -0.1 is not a number from 0 to 1e"),
        ({"patience": True}, "'patience': True is not a number"),
        ({"max_extra_wait": float("nan")}, "'max_extra_wait': nan is not a number"),
        ({"patience": -1}, "'patience': -1 is not a number from 0 to 1e\\+09"),
        ({"tenant": 7}, "'tenant': 7 is not a name: give 'cache_salt', "),
        ({"fair_quantum": 0}, "'fair_quantum': 0 is not a whole number"),
        ({"hold": 1}, "'hold': 1 is not one of true, false"),
        ({"record": None}, "'record': None is not a path: give the path of a file"),
        ({"record_tokens": 1}, "'record_tokens': 1 is not one of true, false"),
        ({"record_limit_mb": 0}, "'record_limit_mb': 0 is not a whole number of at"),
        ({"eviction": 3}, "'eviction': 3 is not one of "),
        ({"attention": True}, "'attention': True is not one of 'stock', 'grouped'"),
        ({"on_unsupported": ""}, "'on_unsupported': '' is not one of 'error', 'stock'"),
        ({"max_overtakes": -1}, "'max_overtakes': -1 is not a whole number"),
        ({"max_overtakes": "9"}, "'max_overtakes': '9' is not a whole number"),
        ({"max_overtakes": True}, "'max_overtakes': True is not a whole number"),
        ({"policy": ["prefix"]}, r"'policy': \['prefix'\] is not one of"),
        ([], "radix options are a mapping"),
    ],
)
def test_bad_options_name_the_option_and_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        RadixConfig.resolve(options, {})


def test_a_bad_environment_is_an_error_too():
    with pytest.raises(ValueError, match="'policy': 'x' is not one of"):
        RadixConfig.resolve({}, {"RADIX_POLICY": "x"})


def test_the_flag_takes_nothing_or_json():
    assert parse_flag("") == {}
    assert parse_flag('{"policy": "fcfs"}') == {"policy": "fcfs"}
    for text in ("a/model", "[1]", "7"):
        with pytest.raises(ValueError, match="--radix takes nothing or a JSON object"):
            parse_flag(text)
    with pytest.raises(ValueError, match="unknown radix option"):
        parse_flag('{"x": 1}')


def test_frozen_and_printable():
    config = RadixConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.policy = "fcfs"
    assert str(config).startswith("policy=prefix, patience=")
    assert RadixConfig(**config.to_dict()) == config
