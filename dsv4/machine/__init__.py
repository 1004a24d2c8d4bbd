# SPDX-License-Identifier: Apache-2.0
"""What is here: DSV4_* variables, engine versions, devices, and who serves DeepSeek-V4 on them.
Needs no torch.
"""
