# SPDX-License-Identifier: Apache-2.0
"""What fits on which machine, and how to start it. Needs no torch and no engine."""
