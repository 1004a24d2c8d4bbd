# SPDX-License-Identifier: Apache-2.0
"""How fast a deployment may serve: an estimate with its measured error."""
