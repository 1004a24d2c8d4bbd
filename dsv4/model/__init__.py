# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4 on paper: its config, its tensors, its checkpoints and the geometry of its caches.
Needs no torch.
"""
