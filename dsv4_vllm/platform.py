# SPDX-License-Identifier: Apache-2.0
"""The real vLLM engine on a machine without an accelerator, from the stock wheel."""

from __future__ import annotations


def register() -> str | None:
    """vllm.platform_plugins entry point: our CPU platform, only where no accelerator exists.

    A machine with a GPU keeps vLLM's own platform, and so does a vLLM that was built for the CPU.
    DSV4_CPU_PLATFORM=on|off overrides what was found.
    """
    from dsv4.machine.admission import wants_cpu_platform

    if not wants_cpu_platform():
        return None
    from vllm.platforms import vllm_version_matches_substr

    return None if vllm_version_matches_substr("cpu") else "dsv4_vllm.cpu_platform.ReferenceCpuPlatform"
