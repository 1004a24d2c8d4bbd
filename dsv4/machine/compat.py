# SPDX-License-Identifier: Apache-2.0
"""Engine versions that dsv4 was tested with, and structural probes for what it uses of each engine.

Both engines swallow a plugin's errors, so a plugin that does not fit turns into the native model or
a crash elsewhere. The plugins ask here first, and register a stand-in that raises this module's
message when something is off.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from dsv4.errors import CompatError

Engine = Literal["vllm", "sglang"]
ENGINES: tuple[Engine, ...] = ("vllm", "sglang")

# The one table of engine versions, oldest first. The supported range, the recipes' ranges and the
# checker follow from it; pyproject.toml's extras and the Makefile repeat it, and a test compares
# them.
TESTED_VERSIONS: dict[Engine, tuple[str, ...]] = {"vllm": ("0.32.0", "0.33.0"), "sglang": ("0.5.22", "0.5.23")}
# Parts of a version that name a tested line: every 0.33.x of vLLM is taken for 0.33, SGLang's lines
# are its patch releases.
_LINE_PARTS: dict[Engine, int] = {"vllm": 2, "sglang": 3}


def _range(tested: tuple[str, ...], parts: int) -> str:
    """From the first tested line to the last, as a PEP 440 range."""
    first, last = (Version(v).release[:parts] for v in (tested[0], tested[-1]))
    end = (*last[:-1], last[-1] + 1)
    return f">={'.'.join(map(str, first))},<{'.'.join(map(str, end))}"


SUPPORTED: dict[Engine, str] = {
    engine: _range(tested, _LINE_PARTS[engine]) for engine, tested in TESTED_VERSIONS.items()
}
_PRODUCT: dict[Engine, str] = {"vllm": "vLLM", "sglang": "SGLang"}


def installed_version(engine: Engine) -> str | None:
    """Version of the installed distribution, read without importing the engine; None when
    absent.
    """
    try:
        return importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        return None


def dsv4_version() -> str:
    """Version of the installed dsv4; "(not installed)" when it runs from a folder that was never
    installed.
    """
    try:
        return importlib.metadata.version("dsv4")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def is_supported(engine: Engine, found: str) -> bool:
    """Whether `found` is in the tested range; a development build counts as the release it leads
    to.
    """
    try:
        release = Version(Version(found).base_version)
    except InvalidVersion:
        return False
    return release in SpecifierSet(SUPPORTED[engine])


def check_version(engine: Engine, found: str, allow_untested: bool = False) -> None:
    """Raise CompatError when `found` is outside the tested range, unless `allow_untested`
    (DSV4_ALLOW_UNTESTED).
    """
    if allow_untested or is_supported(engine, found):
        return
    raise CompatError(
        f"{_PRODUCT[engine]} {found} is outside the range that dsv4 {dsv4_version()} was tested with ({SUPPORTED[engine]});"
        f" install a supported one with `pip install '{engine}{SUPPORTED[engine]}'`, look for a newer dsv4,"
        " or set DSV4_ALLOW_UNTESTED=1 to try this one"
    )


@dataclass(frozen=True)
class Probe:
    """Names that dsv4 uses of one object of an engine.

    where: "module:object", "module:Class.method", or "module" for the module itself. kind: what the
    names are: attributes, fields of a dataclass, or parameters of a callable.
    """

    where: str
    kind: Literal["attribute", "field", "parameter"]
    names: tuple[str, ...]


_MLA_FIELDS = ("block_size", "num_kv_heads", "head_size", "dtype", "tokens_per_state", "state_content_bytes",
               "alignment", "cache_dtype_str", "model_version")  # fmt: skip

PROBES: dict[Engine, tuple[Probe, ...]] = {
    "vllm": (
        Probe("vllm.v1.kv_cache_interface:MLAAttentionSpec", "field", _MLA_FIELDS),
        Probe("vllm.v1.kv_cache_interface:SlidingWindowMLASpec", "field", (*_MLA_FIELDS, "sliding_window")),
        Probe("vllm.v1.kv_cache_layout:KVCacheLayout", "attribute", ("BLHNC", "BLNHC")),
        Probe(
            "vllm.v1.attention.backend:AttentionBackend",
            "attribute",
            (
                "get_name",
                "get_builder_cls",
                "get_impl_cls",
                "get_supported_kernel_block_sizes",
                "supported_kv_cache_layouts",
            ),
        ),
        Probe("vllm.v1.attention.backend:AttentionMetadataBuilder", "attribute", ("build",)),
        Probe(
            "vllm.v1.attention.backend:CommonAttentionMetadata",
            "field",
            (
                "query_start_loc",
                "seq_lens",
                "num_reqs",
                "num_actual_tokens",
                "max_query_len",
                "block_table_tensor",
                "slot_mapping",
            ),
        ),
        Probe("vllm.v1.attention.backend:AttentionCGSupport", "attribute", ("UNIFORM_BATCH",)),
        Probe(
            "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase",
            "attribute",
            ("get_kv_cache_spec", "get_attn_backend"),
        ),
        Probe(
            "vllm.model_executor.layers.fused_moe.layer:FusedMoEFactory",
            "parameter",
            (
                "num_experts",
                "top_k",
                "hidden_size",
                "intermediate_size",
                "quant_config",
                "prefix",
                "router",
                "scoring_func",
                "routed_scaling_factor",
                "swiglu_limit",
                "e_score_correction_bias",
                "hash_indices_table",
                "shared_experts",
            ),
        ),
        Probe("vllm.model_executor.layers.quantization", "attribute", ("register_quantization_config",)),
        Probe("vllm.model_executor.models.registry:ModelRegistry", "attribute", ("register_model",)),
        Probe("vllm.forward_context", "attribute", ("get_forward_context",)),
    ),
    "sglang": (
        Probe("sglang.srt.plugins.hook_registry:HookRegistry", "attribute", ("register",)),
        Probe("sglang.srt.plugins.hook_registry:HookType", "attribute", ("BEFORE", "AFTER", "AROUND")),
        Probe("sglang.srt.utils.hf_transformers.config:HfModelConfigParser.parse", "parameter", ("model", "revision")),
        Probe("sglang.srt.model_executor.pool_configurator:create_memory_pool_configurator", "parameter", ("kvc",)),
        Probe(
            "sglang.srt.model_executor.pool_configurator:MemoryPoolConfigurator",
            "attribute",
            ("calculate_pool_sizes", "calculate_pool_sizes_from_max_tokens", "validate_swa_pool_size"),
        ),
        Probe(
            "sglang.srt.model_executor.pool_configurator:MemoryPoolConfig",
            "field",
            ("max_total_num_tokens", "full_max_total_num_tokens", "swa_max_total_num_tokens"),
        ),
        Probe(
            "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator._build_token_to_kv_pool",
            "parameter",
            ("sizes", "req_to_token_pool"),
        ),
        Probe(
            "sglang.srt.mem_cache.base_swa_memory_pool:BaseSWAKVPool",
            "attribute",
            ("register_mapping", "translate_loc_from_full_to_swa", "get_state_buf_infos", "_finalize_allocation_log"),
        ),
        Probe("sglang.srt.layers.attention.attention_registry", "attribute", ("register_attention_backend",)),
        Probe(
            "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
            "attribute",
            (
                "init_forward_metadata",
                "init_forward_metadata_out_graph",
                "get_cuda_graph_seq_len_fill_value",
                "init_cuda_graph_state",
            ),
        ),
        Probe("sglang.srt.model_executor.cuda_graph_config:with_phase", "parameter", ("config", "phase")),
        Probe("sglang.srt.arg_groups.choices", "attribute", ("ATTENTION_BACKEND_CHOICES",)),
        Probe("sglang.srt.arg_groups.model_override_base", "attribute", ("register_model_override", "resolving_view")),
        Probe("sglang.srt.arg_groups.overrides:declare_resolution", "parameter", ("server_args", "source")),
        Probe(
            "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE.__init__",
            "parameter",
            (
                "num_experts",
                "top_k",
                "hidden_size",
                "intermediate_size",
                "layer_id",
                "reduce_results",
                "quant_config",
                "prefix",
                "swiglu_limit",
            ),
        ),
        Probe(
            "sglang.srt.layers.linear:MergedColumnParallelLinear.__init__",
            "parameter",
            ("output_sizes", "quant_config", "parallel_group"),
        ),
        Probe("sglang.srt.model_executor.forward_context", "attribute", ("get_attn_backend",)),
        Probe("sglang.srt.managers.scheduler:Scheduler", "attribute", ("get_internal_state",)),
        Probe("sglang.srt.platforms.interface", "attribute", ("PlatformCapabilities", "SRTPlatform")),
    ),
}


def missing_symbols(probes: Sequence[Probe]) -> list[str]:
    """One entry per name of `probes` that is absent, as "module:object.name"; imports the
    modules.
    """
    return [absent for probe in probes for absent in _missing(probe)]


def check_structure(engine: Engine, found: str) -> None:
    """Raise CompatError naming every symbol of `engine` that dsv4 uses and this version lacks.

    Imports parts of the engine (about 6 s for vLLM when nothing of it is loaded yet).
    """
    missing = missing_symbols(PROBES[engine])
    if missing:
        raise CompatError(
            f"{_PRODUCT[engine]} {found} lacks what dsv4 {dsv4_version()} uses: {', '.join(missing)};"
            f" install a tested version with `pip install '{engine}{SUPPORTED[engine]}'`, or report it if this one is in that range"
        )


def _missing(probe: Probe) -> list[str]:
    module_name, _, object_name = probe.where.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except ImportError as e:
        return [f"{module_name} ({e})"]
    for part in filter(None, object_name.split(".")):
        if not hasattr(target, part):
            return [probe.where]
        target = getattr(target, part)
    present = _names(target, probe)
    separator = "." if object_name else ":"
    return [f"{probe.where}{separator}{name}" for name in probe.names if name not in present]


def _names(target: Any, probe: Probe) -> set[str]:
    if probe.kind == "field":
        return {field.name for field in dataclasses.fields(target)} if dataclasses.is_dataclass(target) else set()
    if probe.kind == "parameter":
        return set(inspect.signature(target).parameters)
    return {name for name in probe.names if hasattr(target, name)}
