# SPDX-License-Identifier: Apache-2.0
"""What tests share: oracles, cases, and the real engines in processes of their own."""
