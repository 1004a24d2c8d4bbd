# SPDX-License-Identifier: Apache-2.0
"""The real SGLang engine on a machine without an accelerator, from the stock wheel."""

from __future__ import annotations


def register() -> str | None:
    """sglang.srt.platforms entry point: our CPU platform, only where no accelerator exists.

    On a GPU the engine's own platform must stay: an out-of-tree one would switch off its graph
    runners and kernels. DSV4_CPU_PLATFORM=on|off overrides what was found.
    """
    from dsv4.machine.admission import wants_cpu_platform

    return "dsv4_sglang.cpu_platform.ReferenceCpuPlatform" if wants_cpu_platform() else None
