# SPDX-License-Identifier: Apache-2.0
"""What shows a user that dsv4 serves, and serves right."""
