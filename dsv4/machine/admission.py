# SPDX-License-Identifier: Apache-2.0
"""What each plugin asks before it touches its engine: does dsv4 serve V4 here, and may it run on
this engine?"""

from __future__ import annotations

from dsv4.machine import compat, decide, env
from dsv4.machine.compat import Engine
from dsv4.machine.decide import Decision


def admit(engine: Engine) -> Decision:
    """Who serves V4 on this machine. When dsv4 does, the installed engine has a version that it was
    tested with.

    Imports nothing of the engine. Raises EnvError for a bad DSV4_* variable, UnsupportedDeviceError
    for a device that serves no V4, CompatError for an engine outside the tested range.
    """
    env.check_environ()
    decision = decide.decide(env.get("DSV4_MODE"), decide.weakest(decide.detect_devices()))
    if decision.serve:
        found = compat.installed_version(engine) or "(not installed)"
        compat.check_version(engine, found, allow_untested=env.flag("DSV4_ALLOW_UNTESTED"))
    return decision


def check_structure(engine: Engine) -> None:
    """Raises CompatError naming what dsv4 uses of `engine` and the installed version lacks. Imports
    parts of the engine."""
    compat.check_structure(engine, compat.installed_version(engine) or "(not installed)")


def wants_cpu_platform() -> bool:
    """Whether dsv4's CPU platform takes the engine: where no accelerator is, or as
    DSV4_CPU_PLATFORM=on|off says."""
    mode = env.get("DSV4_CPU_PLATFORM")
    return mode == "on" or (mode == "auto" and not decide.has_accelerator_node())
