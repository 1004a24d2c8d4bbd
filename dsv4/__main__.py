# SPDX-License-Identifier: Apache-2.0
"""`python -m dsv4` is the `dsv4` command."""

from dsv4.cli.main import main

main()
