# SPDX-License-Identifier: Apache-2.0
"""Names the model classes to SGLang's registry."""

from dsv4_sglang.draft import DeepseekV4PluginForCausalLMNextN
from dsv4_sglang.model import DeepseekV4PluginForCausalLM

EntryClass = [DeepseekV4PluginForCausalLM, DeepseekV4PluginForCausalLMNextN]
