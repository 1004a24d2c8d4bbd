# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused in the first process, with one clear message, before anything is
started; the rest is served."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from served import Engine

from dsv4.reference.tiny import write_tiny
from tests.support.bad_checkpoints import bad_checkpoints, copy, remove_shard
from tests.support.comparison import TIE_MARGIN, Oracle, assert_equal, request
from tests.support.hf_oracle import load_hf, prompt_without_ties

# Configures the engine for every line of JSON; prints what was raised.
CONFIGURE = """
import json, sys
out = sys.stdout; sys.stdout = sys.stderr
{configure}
for line in sys.stdin:
    try:
        configure(json.loads(line))
        print(json.dumps(["", ""]), file=out, flush=True)
    except Exception as e:
        print(json.dumps([type(e).__name__, str(e)]), file=out, flush=True)
"""


class RefusalChecks:
    """A module inherits these tests and says how its engine spells things."""

    engine: Engine
    harness: ModuleType  # vllm_engine or sglang_engine
    plugin: ModuleType  # dsv4_vllm or dsv4_sglang
    configure: str  # defines configure(arguments), what the engine's server does first
    folder: str  # the engine's argument for the checkpoint
    options: tuple[tuple[dict, list[str]], ...]  # what is refused on a good checkpoint, and words of the message
    unsupported: tuple[str, str]  # a version of the engine, and the supported range
    registered: tuple[str, str]  # prints what serves V4, and the word in it that means ours

    def configured(self, *cases: dict, env: dict[str, str] | None = None) -> list[tuple[str, str]]:
        """(exception type, message) of each case; ("", "") where it would have started."""
        lines = "".join(json.dumps({"dtype": "float32"} | case) + "\n" for case in cases)
        return [
            tuple(json.loads(line))
            for line in self._python(CONFIGURE.format(configure=self.configure), lines, env).splitlines()
        ]

    def refusal(self, folder: Path, env: dict[str, str]) -> str:
        """The message that refuses V4 itself."""
        kind, message = self.configured({self.folder: str(folder)}, env=env)[0]
        assert kind == "RefusedError", (kind, message)
        return message

    def _python(self, code: str, stdin: str = "", env: dict[str, str] | None = None) -> str:
        # Not from the checkout: the working directory would come before PYTHONPATH.
        done = subprocess.run(
            [sys.executable, "-c", code], input=stdin, capture_output=True, text=True, cwd="/", timeout=300,
            env=self.harness.environment(**(env or {})),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def test_each_bad_checkpoint_or_option_gets_its_own_message(
        self, tiny_flash: Path, tiny_pro: Path, tmp_path: Path
    ) -> None:
        folders = bad_checkpoints(tiny_flash, tiny_pro)
        cases = [{self.folder: str(copy(tiny_flash, tmp_path / name, change))} for name, (change, _) in folders.items()]
        cases += [{self.folder: str(tiny_flash)} | option for option, _ in self.options]
        wanted = [words for _, words in folders.values()] + [words for _, words in self.options]
        *found, healthy = self.configured(*cases, {self.folder: str(tiny_flash)})
        wrong = [
            (case, kind, message, words)
            for case, (kind, message), words in zip(cases, found, wanted, strict=True)
            if not kind or not all(word in message for word in words)
        ]
        assert not wrong, "\n".join(map(str, wrong))
        assert healthy == ("", "")

    def test_an_unknown_variable_refuses_v4(self, tiny_flash: Path) -> None:
        message = self.refusal(tiny_flash, {"DSV4_MOED": "on"})
        assert "DSV4_MOED" in message
        assert "DSV4_MODE" in message

    def test_an_unsupported_engine_version_refuses_v4(self, tiny_flash: Path, tmp_path: Path) -> None:
        version, supported = self.unsupported
        info = tmp_path / f"{self.engine.name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {self.engine.name}\nVersion: {version}\n")
        message = self.refusal(tiny_flash, {"PYTHONPATH": str(tmp_path)})
        assert version in message
        assert supported in message

    @pytest.fixture
    def broken_plugin(self, tmp_path: Path) -> dict[str, str]:
        """An environment in which the plugin's model does not import."""
        package = tmp_path / "broken" / self.plugin.__name__
        shutil.copytree(Path(self.plugin.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        model = package / "model.py"
        model.write_text(
            model.read_text().replace("import torch\n", "import torch\nimport a_module_that_is_not_there\n", 1)
        )
        return {"PYTHONPATH": str(package.parent)}

    def test_a_plugin_that_fails_to_import_refuses_v4(self, tiny_flash: Path, broken_plugin: dict[str, str]) -> None:
        assert "a_module_that_is_not_there" in self.refusal(tiny_flash, broken_plugin)

    @pytest.mark.parametrize("broken", [False, True], ids=["healthy plugin", "broken plugin"])
    def test_a_llama_is_served_whatever_happened_to_the_plugin(
        self, broken: bool, broken_plugin: dict[str, str], tmp_path: Path
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        llama = LlamaForCausalLM(config).eval()
        folder = tmp_path / "llama"
        llama.save_pretrained(folder)
        prompts = [[3, 5, 8, 13, 21], list(range(40, 150))]
        phases = [[request(p, 12, prompt_logprobs=False) for p in prompts]]
        env = broken_plugin if broken else {}
        result = self.harness.run(self.harness.engine_args(folder), phases, env=env, status=False)
        for prompt, output in zip(prompts, result["phases"][0], strict=True):
            with torch.inference_mode():
                want = llama.generate(
                    torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
                )
            assert output["tokens"] == want[0, len(prompt) :].tolist()

    def test_the_server_ends_with_the_message_and_a_nonzero_exit(self, tiny_flash: Path, tmp_path: Path) -> None:
        command = self.engine.command(copy(tiny_flash, tmp_path / "missing", remove_shard))
        done = subprocess.run(command, capture_output=True, text=True, env=self.harness.environment(), timeout=200)
        assert done.returncode != 0
        end = "\n".join(done.stderr.strip().splitlines()[-12:])
        assert "dsv4.errors.CheckpointError" in end, end
        assert "model-0000" in end

    def test_mode_off_leaves_the_engines_own_model_in_place(self) -> None:
        """Its own V4 is not ours to test; that ours stepped aside is."""
        code, ours = self.registered
        assert ours not in self._python(code, env={"DSV4_MODE": "off"})
        assert ours in self._python(code, env={"DSV4_MODE": "auto"})

    def test_checkpoints_with_fp8_experts_are_served(self, tmp_path: Path) -> None:
        """Base checkpoints: experts in block FP8, here with e8m0 scales."""
        folder = write_tiny(tmp_path / "fp8", "flash", experts="fp8")
        oracle = Oracle(load_hf(folder))
        text = prompt_without_ties(oracle.model, 200, margin=TIE_MARGIN)
        assert_equal(self.harness.run(self.harness.engine_args(folder), [[request(text, 4)]]), oracle)
