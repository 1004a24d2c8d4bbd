# SPDX-License-Identifier: Apache-2.0
"""Recipes: their schema, their committed proofs, and the ladder of checks."""
