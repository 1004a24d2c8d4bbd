# SPDX-License-Identifier: Apache-2.0
"""config.json as released, carried by SGLang's own config object.

SGLang reads V4's config into a class that drops rope_theta and fills what is missing with defaults
of V3, so what the file says can no longer be told from what it does not say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from dsv4.model.config import MODEL_TYPE, V4Config

_ATTRIBUTE = "dsv4_released"


def check_folder(model: Any) -> None:
    """Refuse a bad config.json of V4 in a local folder before SGLang reads it: its own errors say
    less. Raises ConfigError."""
    file = Path(str(model)) / "config.json"
    try:
        raw = json.loads(file.read_text())
    except (OSError, ValueError):
        return  # not a folder, or no JSON: SGLang's own to say
    if isinstance(raw, dict) and raw.get("model_type") == MODEL_TYPE:
        V4Config.from_dict(raw, str(file))


def attach(config: Any, model: Any, revision: str | None) -> V4Config:
    """Read `model`'s config.json again and keep it on `config`. Raises ConfigError."""
    raw, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    setattr(config, _ATTRIBUTE, raw | {"_source": f"{model}/config.json"})
    return read(config)


def read(config: Any) -> V4Config:
    """The V4 config that `attach` kept."""
    raw = dict(getattr(config, _ATTRIBUTE))
    return V4Config.from_dict(raw, raw.pop("_source"))


def source(config: Any) -> str:
    """The folder or hub id that `config` was read from."""
    return str(getattr(config, _ATTRIBUTE)["_source"]).removesuffix("/config.json")
