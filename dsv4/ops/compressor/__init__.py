# SPDX-License-Identifier: Apache-2.0
"""Pooling of 4 (CSA) or 128 (HCA) tokens into one cache entry. Source: docs/model.md, 3.4.

`projected.py` holds what every mapping of the open windows takes, `entry.py` what happens to a
pooled entry. The mappings: `paged` keeps raw rows in pages, `ring` raw rows of the open windows
alone, `summary` three numbers per channel.
"""
