# SPDX-License-Identifier: Apache-2.0
"""The names under which SGLang knows dsv4. A leaf: registration, hooks and backends all need
them."""

# Not V4's own name, so that none of SGLang's branches for its native V4 is taken; with "DeepseekV4"
# in it, which selects V4's chat encoding.
ARCHITECTURE = "DeepseekV4PluginForCausalLM"
DRAFT_ARCHITECTURE = "DeepseekV4PluginForCausalLMNextN"
ATTENTION_BACKEND = "dsv4_plugin"
