# SPDX-License-Identifier: Apache-2.0
"""The `dsv4` command: parse, call, print."""
