# SPDX-License-Identifier: Apache-2.0
"""The package that SGLANG_EXTERNAL_MODEL_PACKAGE names: SGLang looks in its modules for
`EntryClass`."""
