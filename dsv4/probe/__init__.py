# SPDX-License-Identifier: Apache-2.0
"""A program of its own that asks an installed engine: `python -m dsv4.probe`."""
