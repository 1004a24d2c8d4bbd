# SPDX-License-Identifier: Apache-2.0
"""Bytes on one rank, by each engine's own accounting, and the proof that they fit."""
