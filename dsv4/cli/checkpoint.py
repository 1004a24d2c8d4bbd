# SPDX-License-Identifier: Apache-2.0
"""`dsv4 check`: a checkpoint folder against its config."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dsv4.cli.output import CHECK_FAILED, console, json_option, print_json
from dsv4.errors import CheckpointError


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--config", type=click.Path(exists=True, path_type=Path), help="Another config.json than the folder's own."
)
@click.option("--require-draft", is_flag=True, help="Fail when the speculative draft (mtp.*) is absent.")
@json_option
def check(folder: Path, config: Path | None, require_draft: bool, as_json: bool) -> None:
    """Validate the checkpoint in FOLDER from its safetensors headers and hash tables.

    Names every missing, extra, misshapen or mis-typed tensor, and every absent or truncated shard.
    """
    from dsv4.model.checkpoint import validate
    from dsv4.model.config import V4Config

    expected = V4Config.from_path(config or folder)
    try:
        report = validate(folder, expected, require_draft)
    except CheckpointError as e:
        if as_json:
            print_json({"folder": str(folder), "ok": False, "error": str(e)})
        else:
            click.echo(f"dsv4: {e}", err=True)
        sys.exit(CHECK_FAILED)
    facts = {
        "folder": str(folder),
        "ok": True,
        "tensors": len(report.headers),
        "bytes": report.total_bytes,
        "shards": len(report.files),
        "layers": expected.num_hidden_layers,
        "experts": expected.expert_dtype,
        "expert_scales": report.expert_scale_dtype,
        "draft": report.draft,
        "ignored": list(report.ignored),
    }
    if as_json:
        print_json(facts)
        return
    console().print(
        f"{folder}: complete: {len(report.headers):,} tensors, {report.total_bytes / 1e9:,.2f} GB in {len(report.files)} shards;"
        f" {expected.num_hidden_layers} layers, {expected.expert_dtype} experts, draft: {report.draft}"
    )
