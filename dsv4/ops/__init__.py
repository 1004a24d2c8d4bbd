# SPDX-License-Identifier: Apache-2.0
"""The model's operators: one folder each, holding a plain-PyTorch reference and the kernels it is
the truth for."""
