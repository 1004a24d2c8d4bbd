# SPDX-License-Identifier: Apache-2.0
"""The model written for truth instead of speed: the whole forward pass, and small checkpoints to
run it on."""
