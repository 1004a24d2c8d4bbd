# SPDX-License-Identifier: Apache-2.0
"""Number formats of weights and caches: e4m3, e2m1 and ue8m0, all handled as integers."""
