# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from dsv4.errors import EnvError
from dsv4.machine import env


def test_there_are_at_most_ten_variables_each_with_a_meaning_and_a_valid_default():
    assert len(env.VARIABLES) <= 10
    for name, variable in env.VARIABLES.items():
        assert name == variable.name
        assert name.startswith(env.PREFIX)
        assert variable.default in variable.choices
        assert variable.meaning


def test_unset_and_empty_mean_the_default():
    assert env.check_environ({}) == {name: variable.default for name, variable in env.VARIABLES.items()}
    assert env.get("DSV4_MODE", {"DSV4_MODE": " "}) == "auto"


def test_case_and_surrounding_space_do_not_matter():
    assert env.get("DSV4_MODE", {"DSV4_MODE": " ON "}) == "on"


def test_the_process_environment_is_read(monkeypatch):
    monkeypatch.setenv("DSV4_OPS", "reference")
    assert env.get("DSV4_OPS") == "reference"


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_flags_are_zero_or_one(value, on):
    assert env.flag("DSV4_CHECK", {"DSV4_CHECK": value}) is on


def test_a_variable_with_more_choices_is_no_flag():
    with pytest.raises(ValueError, match="no flag"):
        env.flag("DSV4_MODE", {})


def test_unknown_variable_is_refused_with_the_nearest_name():
    with pytest.raises(EnvError, match=r"DSV4_MOD: unknown variable; did you mean DSV4_MODE\?"):
        env.check_environ({"DSV4_MOD": "on"})


def test_unknown_variable_far_from_all_lists_them():
    with pytest.raises(EnvError, match="known are DSV4_MODE, DSV4_OPS"):
        env.check_environ({"DSV4_ZZZZZZZZZZZZZZ": "1"})


@pytest.mark.parametrize(("name", "value"), [("DSV4_MODE", "yes"), ("DSV4_CHECK", "true"), ("DSV4_OPS", "cuda")])
def test_bad_value_is_refused_with_the_choices(name, value):
    with pytest.raises(EnvError, match=f"{name}={value}: expected one of {', '.join(env.VARIABLES[name].choices)}"):
        env.check_environ({name: value})


def test_all_problems_come_in_one_message():
    with pytest.raises(EnvError, match=r"DSV4_A:.*DSV4_B:.*DSV4_MODE=x"):
        env.check_environ({"DSV4_B": "", "DSV4_A": "", "DSV4_MODE": "x"})


def test_other_peoples_variables_are_none_of_our_business():
    env.check_environ({"VLLM_PLUGINS": "x", "XDSV4_MODE": "x"})
