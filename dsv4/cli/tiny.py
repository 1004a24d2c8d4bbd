# SPDX-License-Identifier: Apache-2.0
"""`dsv4 tiny`: the command line of `dsv4.reference.tiny`, which needs torch."""

from __future__ import annotations

from pathlib import Path

import click

from dsv4.cli.output import console, json_option, print_json
from dsv4.model.checkpoint import validate
from dsv4.reference.tiny import Variant, write_tiny


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--variant", type=click.Choice(["flash", "pro"]), default="flash", show_default=True, help="Layer mix to imitate."
)
@click.option("--layers", type=click.IntRange(1, 64), default=6, show_default=True, help="Decoder layers.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Same seed, same bytes.")
@click.option(
    "--experts", type=click.Choice(["fp4", "fp8"]), default="fp4", show_default=True, help="Storage of routed experts."
)
@click.option(
    "--draft", type=click.Choice(["mtp", "dspark", "none"]), default="mtp", show_default=True, help="Speculative draft."
)
@click.option("--agree", is_flag=True, help="Let a token mostly decide the next, and the draft know it.")
@json_option
def tiny(
    out: Path, variant: Variant, layers: int, seed: int, experts: str, draft: str, agree: bool, as_json: bool
) -> None:
    """Write a small random checkpoint in the released format to the new folder OUT."""
    folder = write_tiny(
        out,
        variant,
        num_layers=layers,
        seed=seed,
        experts="fp8" if experts == "fp8" else "fp4",
        draft="mtp" if draft == "mtp" else "dspark" if draft == "dspark" else "none",
        progress=console().is_terminal and not as_json,
        agree=agree,
    )
    report = validate(folder)
    if as_json:
        facts = {
            "folder": str(folder),
            "tensors": len(report.headers),
            "bytes": report.total_bytes,
            "shards": len(report.files),
        }
        print_json(facts)
    else:
        size = f"{report.total_bytes / 1e6:.1f} MB in {len(report.files)} shards"
        console().print(
            f"{folder}: wrote {len(report.headers)} tensors, {size}; {variant}, {layers} layers, {experts} experts"
        )
