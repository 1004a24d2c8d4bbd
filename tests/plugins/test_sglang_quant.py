# SPDX-License-Identifier: Apache-2.0
"""What SGLang's Marlin kernels would be handed on sm80, sm86 and sm89, seen without such a GPU.

SGLang's own code creates, loads, repacks and calls; only what needs CUDA is replaced: the repacking
of weights by a reshape, and the expert kernel by the product it stands for, computed from the
tensors it was handed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from served import HOST, free_port
from torch import Tensor

from dsv4.errors import DeploymentError
from dsv4.loading import hand_over
from dsv4.machine.decide import Device
from dsv4.model.config import V4Config
from dsv4.model.tensors import tensor_specs
from dsv4.ops import moe
from dsv4.ops.quant.reference import dequantize_expert, dequantize_fp8_block
from dsv4.reference.tiny import write_tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "configs"
E, HIDDEN, TOP_K, LIMIT = 4, 512, 2, 0.5  # a limit that many values reach
PREFIX = "model.layers.0.ffn.experts"
SM8X = [(8, 0), (8, 6), (8, 9)]


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """SGLang configured in this process, as one rank that was told to run experts with Marlin."""
    from sglang.srt import runtime_context
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.moe.utils import MoeRunnerBackend
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    folder = write_tiny(tmp_path_factory.mktemp("quant") / "tiny", "flash", num_layers=4)
    load_plugins()
    args = ServerArgs(
        model_path=str(folder), device="cpu", dtype="bfloat16", context_length=512, skip_tokenizer_init=True
    )
    args.resolve_once()
    runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0))
    address = f"tcp://{HOST}:{free_port()}"
    init_distributed_environment(backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=address)
    initialize_model_parallel()
    runtime_context.get_flags().moe.runner_backend = MoeRunnerBackend.MARLIN
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(dtype)
    torch.distributed.destroy_process_group()


def quant_config() -> Any:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    from dsv4_sglang.quant import V4QuantConfig

    released = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }
    return V4QuantConfig.adopt(Fp8Config.from_config(released), "fp4")


@pytest.fixture
def gpu(sglang: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[int, int]:
    """SGLang's quantisation code believes in a GPU of the parametrised capability."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe
    from sglang.srt.layers.quantization import fp8, fp8_utils, marlin_utils, marlin_utils_fp4, marlin_utils_fp8

    from dsv4_sglang import quant

    monkeypatch.setattr(quant, "on_cpu", lambda: False)
    monkeypatch.setattr(fp8, "_is_cuda", True)
    monkeypatch.setattr(fp8_utils, "get_device_capability", lambda: request.param)
    for module in (marlin_utils, marlin_utils_fp4, marlin_utils_fp8):
        monkeypatch.setattr(module, "marlin_make_workspace", lambda *a, **k: torch.zeros(1, dtype=torch.int32))
    for module in (marlin_utils_fp4, marlin_utils_fp8):
        monkeypatch.setattr(module, "gptq_marlin_repack", reshaped_repack, raising=False)
    monkeypatch.setattr(fused_marlin_moe, "fused_marlin_moe", marlin_experts)
    return request.param


def reshaped_repack(b_q_weight: Tensor, perm: Tensor, size_k: int, size_n: int, num_bits: int) -> Tensor:
    """Stands in for the kernel that reorders weights: its conditions and its output's shape,
    without the order."""
    pack = 32 // num_bits
    assert (b_q_weight.shape, b_q_weight.dtype) == ((size_k // pack, size_n), torch.int32)
    assert size_k % 16 == 0
    assert size_n % 64 == 0
    return b_q_weight.reshape(size_k // 16, size_n * 16 // pack).clone()


def unpermuted(scales: Tensor, size_k: int, size_n: int, group: int, interleaved: bool) -> Tensor:
    """Scales as Marlin holds them, [K / group, N], back in the order of rows: [N, K / group]
    fp32."""
    from sglang.srt.layers.quantization.marlin_utils import marlin_permute_scales

    order = marlin_permute_scales(torch.arange(scales.numel()).view(scales.shape), size_k, size_n, group)
    if interleaved:  # e8m0 scales are read four at a time
        order = order.view(-1, 4)[:, [0, 2, 1, 3]]
    out = torch.empty(scales.numel(), dtype=torch.float32)
    out[order.flatten()] = scales.float().flatten()
    return out.view(scales.shape).T


def marlin_experts(
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    w1_scale: Tensor,
    w2_scale: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    **options: Any,
) -> Tensor:
    """Stands in for `fused_marlin_moe`: its conditions, and the product computed in fp32 from what
    it was handed."""
    k, n = hidden_states.shape[1], w2.shape[1] * 16
    assert hidden_states.dtype is torch.bfloat16
    assert hidden_states.shape[0] == options["gating_output"].shape[0]
    assert k == w1.shape[1] * 16 == w2.shape[2] // 2
    assert w1_scale.dtype is w2_scale.dtype is torch.float8_e8m0fnu
    assert (options["num_bits"], options["activation"], options["is_gated"]) == (4, "silu", True)
    assert options["gemm1_alpha"] is options["routed_scaling_factor"] is options["expert_map"] is None
    assert k % 64 == (2 * n) % 128 == n % 64 == k % 128 == 0  # one of the kernel's tiles fits each product

    def plain(packed: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
        codes = packed.reshape(columns // 8, rows).T.contiguous().view(torch.uint8)
        assert scale.shape == (columns // 32, rows)
        return dequantize_expert(
            codes[None], unpermuted(scale, columns, rows, 32, True)[None].to(torch.float8_e8m0fnu).view(torch.uint8)
        )[0]

    w13 = torch.stack([plain(w, s, 2 * n, k) for w, s in zip(w1, w1_scale, strict=True)])
    down = torch.stack([plain(w, s, k, n) for w, s in zip(w2, w2_scale, strict=True)])
    out = moe.experts(hidden_states.float(), w13.float(), down.float(), topk_weights, topk_ids, options["clamp_limit"])
    return out.to(hidden_states.dtype)


def released_experts(intermediate: int) -> dict[str, Tensor]:
    """One layer's experts as a checkpoint stores them, with scales from 2**-9 to 2**-5."""
    seed = torch.Generator().manual_seed(intermediate)
    tensors = {}
    for expert in range(E):
        for linear, rows, columns in (
            ("w1", intermediate, HIDDEN),
            ("w2", HIDDEN, intermediate),
            ("w3", intermediate, HIDDEN),
        ):
            name = f"layers.0.ffn.experts.{expert}.{linear}"
            tensors[f"{name}.weight"] = torch.randint(-128, 128, (rows, columns // 2), generator=seed, dtype=torch.int8)
            scale = torch.randint(118, 123, (rows, columns // 32), generator=seed, dtype=torch.uint8)
            tensors[f"{name}.scale"] = scale.view(torch.float8_e8m0fnu)
    return tensors


def make_experts(intermediate: int) -> Any:
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    return FusedMoE(
        num_experts=E,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        layer_id=0,
        reduce_results=False,
        quant_config=quant_config(),
        prefix=PREFIX,
        swiglu_limit=LIMIT,
    )


def load(layer: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    params = {f"{prefix}.{name}": p for name, p in layer.named_parameters()}
    for name, tensor in tensors.items():
        hand_over(params, name, tensor, tp_rank=0)


@pytest.mark.parametrize("gpu", SM8X, indirect=True, ids=str)
@pytest.mark.parametrize("intermediate", [256, 192], ids=["whole tiles", "padded"])
def test_marlin_experts_compute_what_was_released(gpu: tuple[int, int], intermediate: int) -> None:
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from dsv4_sglang.quant import UngatedMarlinExpertsMethod

    layer, tensors = make_experts(intermediate), released_experts(intermediate)
    assert type(layer.quant_method) is UngatedMarlinExpertsMethod
    load(layer, PREFIX, tensors)
    layer.quant_method.process_weights_after_loading(layer)
    seed = torch.Generator().manual_seed(1)
    x = torch.randn(7, HIDDEN, generator=seed, dtype=torch.float32).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=seed)[:TOP_K] for _ in range(7)]).int()
    weights = torch.rand(7, TOP_K, generator=seed, dtype=torch.float32)
    got = layer(x, StandardTopKOutput(weights, ids, torch.zeros(7, E)))

    def plain(linear: str) -> Tensor:
        names = [f"layers.0.ffn.experts.{expert}.{linear}" for expert in range(E)]
        codes, scales = (
            torch.stack([tensors[f"{n}.{kind}"].view(torch.uint8) for n in names]) for kind in ("weight", "scale")
        )
        return dequantize_expert(codes, scales).float()

    want = moe.experts(x.float(), torch.cat([plain("w1"), plain("w3")], 1), plain("w2"), weights, ids, LIMIT)
    # The same fp32 sums in another order (1e-5 of the largest), rounded once to bf16 (2**-9 of the
    # value).
    assert ((got.float() - want).abs() <= 2**-8 * want.abs() + 1e-5 * want.abs().max()).all()


@pytest.mark.parametrize("gpu", SM8X, indirect=True, ids=str)
@pytest.mark.parametrize("sm90", [False, True], ids=["sm8x", "sm90"])
def test_marlins_activation_is_our_kernel_where_sglang_has_none(
    gpu: tuple[int, int], sm90: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the engine calls between its two products: rounded once, where its own rounds twice."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe

    from dsv4_sglang import quant

    own = getattr(fused_marlin_moe.swiglu_limit_func, "own", fused_marlin_moe.swiglu_limit_func)
    monkeypatch.setattr(fused_marlin_moe, "swiglu_limit_func", own)
    monkeypatch.setattr(quant, "get_platform", lambda: SimpleNamespace(is_sm90=sm90))
    make_experts(256)
    if sm90:
        assert fused_marlin_moe.swiglu_limit_func is own
        return
    x = torch.randn(9, 512, dtype=torch.float32).bfloat16()
    got, rounded_twice = torch.empty(2, 9, 256, dtype=torch.bfloat16)
    fused_marlin_moe.swiglu_limit_func(got, x, LIMIT)
    own(rounded_twice, x, LIMIT)
    gate, up = x.chunk(2, -1)
    assert torch.equal(got, moe.swiglu(gate, up, LIMIT))
    assert not torch.equal(got, rounded_twice)
    assert (got.float() - rounded_twice.float()).abs().max() <= 2**-7 * got.float().abs().max()
    make_experts(256)  # a second layer does not wrap it again
    assert fused_marlin_moe.swiglu_limit_func.own is own
    assert inspect.getsource(fused_marlin_moe).count("        swiglu_limit_func(\n") == 1  # the engine still calls it


@pytest.mark.parametrize("gpu", SM8X, indirect=True, ids=str)
def test_sglangs_own_method_still_has_the_gate_that_ours_leaves_out(gpu: tuple[int, int]) -> None:
    """When this fails, SGLang lets these GPUs through, and ours can go."""
    from sglang.srt.layers.quantization.mxfp4_marlin_moe import Mxfp4MarlinMoEMethod

    layer = make_experts(256)
    load(layer, PREFIX, released_experts(256))
    with pytest.raises(RuntimeError, match="requires SM90"):
        Mxfp4MarlinMoEMethod.process_weights_after_loading(layer.quant_method, layer)


@pytest.mark.parametrize("gpu", SM8X, indirect=True, ids=str)
def test_dense_fp8_linears_are_weight_only_below_sm89(gpu: tuple[int, int]) -> None:
    """Marlin dequantises on sm80 and sm86, which have no fp8; sm89 multiplies in fp8, by Triton.
    wo_a is plain everywhere."""
    from sglang.srt.layers.linear import MergedColumnParallelLinear
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
    from sglang.srt.layers.quantization.fp8_utils import triton_w8a8_block_fp8_linear

    from dsv4_sglang.quant import DequantizedLinearMethod

    def linear(name: str) -> Any:
        return MergedColumnParallelLinear(
            256,
            [384, 128],
            bias=False,
            quant_config=quant_config(),
            prefix=f"model.layers.0.attn.{name}",
            parallel_group="replicated",
        )

    assert type(linear("wo_a").quant_method) is DequantizedLinearMethod
    layer = linear("fused_wqa_wkv")
    method = layer.quant_method
    assert type(method) is Fp8LinearMethod
    assert method.use_marlin == (gpu < (8, 9))
    assert method.w8a8_block_fp8_linear is triton_w8a8_block_fp8_linear
    seed = torch.Generator().manual_seed(2)
    tensors = {}
    for name, rows in (("wq_a", 384), ("wkv", 128)):
        tensors[f"layers.0.attn.{name}.weight"] = torch.randn(rows, 256, generator=seed, dtype=torch.float32).to(
            torch.float8_e4m3fn
        )
        scale = torch.randint(110, 125, (rows // 128, 2), generator=seed, dtype=torch.uint8)
        tensors[f"layers.0.attn.{name}.scale"] = scale.view(torch.float8_e8m0fnu)
    load(layer, "model.layers.0.attn.fused_wqa_wkv", tensors)
    weights, scales = (
        torch.cat([tensors[f"layers.0.attn.{n}.{kind}"].float() for n in ("wq_a", "wkv")])
        for kind in ("weight", "scale")
    )
    want = dequantize_fp8_block(weights.to(torch.float8_e4m3fn), scales)
    if not method.use_marlin:
        assert torch.equal(dequantize_fp8_block(layer.weight.data, layer.weight_scale_inv.data), want)
        return
    method.process_weights_after_loading(layer)
    codes = layer.weight.reshape(256 // 4, 512).T.contiguous().view(torch.float8_e4m3fn)
    # Marlin's e4m3 values are 2**-120 of what they mean in bf16, and its scales make up for it.
    factor = unpermuted(layer.weight_scale.float() * 2.0**-120, 256, 512, 128, False).repeat_interleave(128, 1)
    assert torch.equal(codes.float() * factor, want.float())


@pytest.mark.parametrize("capability", SM8X, ids=str)
def test_fp8_experts_are_refused_where_no_kernel_takes_them(capability: tuple[int, int], tmp_path: Path) -> None:
    """Base checkpoints: SGLang's FP8 experts have no weight-only kernel."""
    from dsv4_sglang.support import check_gpu

    config = V4Config.from_path(write_tiny(tmp_path / "tiny", "flash", num_layers=4, experts="fp8"))
    gpu = Device("cuda", "GPU", capability)
    with pytest.raises(DeploymentError, match="float32"):
        check_gpu(config, torch.float32, gpu)
    if capability >= (8, 9):
        check_gpu(config, torch.bfloat16, gpu)
        return
    with pytest.raises(DeploymentError, match=f"which {gpu.arch} cannot"):
        check_gpu(config, torch.bfloat16, gpu)


@pytest.mark.usefixtures("sglang")
def test_the_cpu_takes_neither() -> None:
    from sglang.srt.layers.linear import ReplicatedLinear

    from dsv4_sglang.quant import DequantizedExpertsMethod, DequantizedLinearMethod

    assert type(make_experts(256).quant_method) is DequantizedExpertsMethod
    linear = ReplicatedLinear(256, 256, bias=False, quant_config=quant_config(), prefix="model.layers.0.attn.wq_b")
    assert type(linear.quant_method) is DequantizedLinearMethod


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.json")), ids=lambda file: file.stem)
def test_marlin_has_a_tile_for_every_shard_of_the_released_checkpoints(file: Path) -> None:
    """Dense: N and K in whole 128-blocks. Experts: K in 64s, N in 128s; SGLang pads their
    intermediate size up to that."""
    config = V4Config.from_dict(json.loads(file.read_text()), str(file))
    for tp in (n for n in (1, 2, 4, 8) if config.o_groups % n == 0):
        for spec in tensor_specs(config, include_draft=False).values():
            if spec.dtype == "F8_E4M3" and not spec.is_routed_expert and not spec.name.endswith("wo_a.weight"):
                shape = [size // tp if axis == spec.shard_axis else size for axis, size in enumerate(spec.shape)]
                assert all(size % 128 == 0 for size in shape), (spec.name, tp, shape)
        assert config.hidden_size % 128 == 0
        assert config.moe_intermediate_size // tp % 64 == 0


def test_a_machine_without_compilers_is_refused_before_the_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dsv4_sglang.support import check_compilers

    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(DeploymentError, match=rf"nvcc \({programs}/nvcc\) and ninja not found.*CUDA_HOME"):
        check_compilers()
    (programs / "nvcc").touch()
    with pytest.raises(DeploymentError, match=r"^ninja not found"):
        check_compilers()
    (programs / "ninja").touch()
    (programs / "ninja").chmod(0o755)
    check_compilers()


def test_fp4_experts_are_refused_on_rocm(tiny_flash: Path) -> None:
    from dsv4_sglang.support import check_gpu

    with pytest.raises(DeploymentError, match="expert_dtype fp4 on ROCm"):
        check_gpu(V4Config.from_path(tiny_flash / "config.json"), torch.bfloat16, Device("rocm", "MI300X"))


def test_too_little_memory_names_what_takes_it() -> None:
    from dsv4_sglang.caches import V4PoolConfigurator

    sizes = object.__new__(V4PoolConfigurator)
    sizes.max_requests, sizes.fixed_bytes, sizes.bytes_per_token = 256, 5 << 29, 7000.0
    with pytest.raises(DeploymentError, match=r"^--max-running-requests 256: .*takes 2\.50 GiB.*leave 1\.00 GiB"):
        sizes.calculate_pool_sizes(1 << 30, 256)
