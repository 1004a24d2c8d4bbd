# SPDX-License-Identifier: Apache-2.0
"""`dsv4 doctor`: what `dsv4.proof.doctor` found, on a terminal or as JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from dsv4.cli.output import CHECK_FAILED, console, json_option, print_json
from dsv4.machine import env
from dsv4.proof.doctor import Diagnosis, ServerReport, diagnose


@click.command()
@click.option("--url", help="A running server, e.g. http://localhost:8000: prove what serves there.")
@click.option("--api-key", help="That server's API key; DSV4_API_KEY or VLLM_API_KEY, when not given.")
@json_option
def doctor(url: str | None, api_key: str | None, as_json: bool) -> None:
    """Say what would serve DeepSeek-V4 here and why; with --url, prove what a running server uses.

    Exits 1 when something is wrong; each problem comes with its next step.
    """
    result = diagnose(url, api_key=api_key)
    if as_json:
        print_json({**asdict(result), "ok": result.ok})
    else:
        _print(result)
    if not result.ok:
        sys.exit(CHECK_FAILED)


def _print(result: Diagnosis) -> None:
    out = console()
    out.print(f"dsv4 {result.dsv4}, Python {result.python}")
    for device in result.devices:
        memory = f", {device.memory_mib} MiB" if device.memory_mib else ""
        out.print(f"device    {device.name} ({device.arch}{memory})")
    for name, report in result.engines.items():
        mark = "supported" if report.is_supported else f"NOT in {report.supported}"
        out.print(
            f"{name:<9} {report.version} ({mark}); {'dsv4 would serve V4' if report.serves else 'dsv4 would not serve V4'}: {report.reason}"
        )
    changed = {n: v for n, v in result.environment.items() if v != env.VARIABLES[n].default}
    out.print(
        "settings  "
        + (", ".join(f"{n}={v}" for n, v in changed.items()) if changed else "all DSV4_* at their defaults")
    )
    if result.server is not None:
        _print_server(result.server)
    for note in result.notes:
        out.print(f"note      {note}")
    for problem in result.problems:
        out.print(f"PROBLEM   {problem}")
    if result.ok:
        out.print("ok")


def _print_server(server: ServerReport) -> None:
    status = server.status
    if status is None:
        return
    out = console()
    verdict = "dsv4 is serving" if server.serving else "dsv4 is NOT serving"
    out.print(
        f"server    {server.url}: {verdict} ({status.engine} {status.engine_version}, dsv4 {status.dsv4_version})"
    )
    if status.acceptance is not None:
        kept = status.acceptance.by_position
        places = "" if kept is None else f"; kept by position {', '.join(f'{part:.0%}' for part in kept)}"
        out.print(f"  drafts: {status.acceptance.tokens_per_step:.2f} tokens a step{places}")
    for worker in status.workers:
        out.print(f"  rank {worker.rank}: {worker.model_class}, quantisation {worker.quant_method}")
        out.print(
            f"    attention {', '.join(worker.attention_backends)}; KV {worker.kv_format}, index {worker.index_format}"
        )
        if worker.draft_class is not None:
            out.print(f"    drafts {worker.drafted} tokens a step by {worker.draft_class}")
        for op, chosen in sorted(worker.ops.items()):
            out.print(f"    {op:<22} {chosen.impl}: {chosen.reason}")
