# SPDX-License-Identifier: Apache-2.0
"""Names the model class to SGLang's registry."""

from dsv4_sglang.model import DeepseekV4PluginForCausalLM

EntryClass = DeepseekV4PluginForCausalLM
