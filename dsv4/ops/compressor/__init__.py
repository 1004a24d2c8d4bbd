# SPDX-License-Identifier: Apache-2.0
"""Pooling of 4 (CSA) or 128 (HCA) tokens into one cache entry, one module per mapping of the open windows. Source: spec section 3.4."""
