# SPDX-License-Identifier: Apache-2.0
"""`dsv4 doctor`: what would serve DeepSeek-V4 here and why, and what a running server really uses.

Nothing is guessed about a server: its own workers report through GET /dsv4/status, a route that the
plugin adds. Neither an engine nor torch is imported, so the doctor works where an engine would
crash.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
import os
import platform
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv4.errors import Dsv4Error, EnvError, StatusError, UnsupportedDeviceError
from dsv4.machine import compat, decide, env
from dsv4.machine.compat import Engine
from dsv4.machine.compilers import missing_compilers
from dsv4.machine.decide import Device
from dsv4.proof.status import STATUS_ROUTE, ServerStatus

# Entry points through which each engine finds us: (group, name).
ENTRY_POINTS: dict[Engine, tuple[tuple[str, str], ...]] = {
    "vllm": (("vllm.platform_plugins", "dsv4_cpu"), ("vllm.general_plugins", "dsv4")),
    "sglang": (("sglang.srt.platforms", "dsv4_cpu"), ("sglang.srt.plugins", "dsv4")),
}
_TIMEOUT_S = 10.0
_MAX_BYTES = 1 << 20
_NO_ANSWER = (urllib.error.URLError, OSError, http.client.HTTPException)  # the last: something else than HTTP answered


@dataclass
class EngineReport:
    """An installed engine: whether its version is supported, whether it will find the plugin, who
    would serve V4."""

    version: str
    supported: str
    is_supported: bool
    entry_points: dict[str, str | None]
    serves: bool
    reason: str


@dataclass
class ServerReport:
    """A server that was asked. serving: every worker runs dsv4's classes; status: what it told,
    None when it told nothing."""

    url: str
    serving: bool = False
    status: ServerStatus | None = None


@dataclass
class Diagnosis:
    """Everything the doctor found. problems: what is wrong and the next step, one sentence each."""

    dsv4: str
    python: str
    devices: list[Device]
    environment: dict[str, str]
    engines: dict[str, EngineReport]
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    server: ServerReport | None = None

    @property
    def ok(self) -> bool:
        return not self.problems


def diagnose(url: str | None = None, environ: Mapping[str, str] | None = None, api_key: str | None = None) -> Diagnosis:
    """Look at this machine, and at the server at `url` when given.

    api_key: the server's; by default the environment's. Raises Dsv4Error for a malformed url.
    """
    environ = os.environ if environ is None else environ
    result = Diagnosis(compat.dsv4_version(), platform.python_version(), list(decide.detect_devices(environ)), {}, {})
    _check_environment(result, environ)
    decision = _decide(result)
    for engine in compat.ENGINES:
        version = compat.installed_version(engine)
        if version is not None:
            _check_engine(result, engine, version, decision, environ)
    if not result.engines:
        result.notes.append(
            "no engine is installed here: planning and checking work, serving needs `pip install 'dsv4[vllm]'`"
        )
    if url is not None:
        _check_server(result, url, api_key or env.api_key(environ))
    return result


def _check_environment(result: Diagnosis, environ: Mapping[str, str]) -> None:
    try:
        result.environment = env.check_environ(environ)
    except EnvError as e:
        result.problems.append(str(e))


def _decide(result: Diagnosis) -> decide.Decision:
    mode = result.environment.get("DSV4_MODE", env.VARIABLES["DSV4_MODE"].default)
    try:
        return decide.decide(mode, decide.weakest(result.devices))
    except UnsupportedDeviceError as e:
        result.problems.append(str(e))
        return decide.Decision(False, str(e))


def _check_engine(
    result: Diagnosis, engine: Engine, version: str, decision: decide.Decision, environ: Mapping[str, str]
) -> None:
    supported = compat.is_supported(engine, version)
    entry_points = {f"{group}:{name}": _entry_point(group, name) for group, name in ENTRY_POINTS[engine]}
    has_plugin = importlib.util.find_spec(f"dsv4_{engine}") is not None
    report = EngineReport(version, compat.SUPPORTED[engine], supported, entry_points, decision.serve, decision.reason)
    result.engines[engine] = report
    if not has_plugin:
        report.serves, report.reason = False, f"this dsv4 has no plugin for {engine} yet"
        return
    try:
        compat.check_version(engine, version, result.environment.get("DSV4_ALLOW_UNTESTED") == "1")
    except Dsv4Error as e:
        report.serves, report.reason = False, "the plugin refuses this engine version"
        result.problems.append(str(e))
    absent = [name for name, value in entry_points.items() if value is None]
    if absent:
        report.serves, report.reason = False, f"{engine} does not find the plugin"
        result.problems.append(
            f"{engine} cannot find the plugin: entry points {', '.join(absent)} are not installed;"
            " run `pip install dsv4` (or `pip install -e .` in a checkout) with this interpreter"
        )
    if engine == "vllm":
        _check_vllm_environment(result, report, environ)
    else:
        _check_sglang_environment(result, report, environ)
        if report.serves and result.devices[0].kind == "cuda" and (missing := missing_compilers(environ)):
            report.serves, report.reason = False, "SGLang cannot compile Marlin's kernels"
            result.problems.append(missing)
    if result.devices[0].kind == "cpu" and result.environment.get("DSV4_CPU_PLATFORM") == "off":
        report.serves, report.reason = False, "DSV4_CPU_PLATFORM=off leaves the engine without a device"


def _check_vllm_environment(result: Diagnosis, report: EngineReport, environ: Mapping[str, str]) -> None:
    """vLLM's own variables that silently keep the plugin out."""
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is not None:
        names = {name.strip() for name in allowed.split(",")}
        needed = {"dsv4"} | ({"dsv4_cpu"} if result.devices[0].kind == "cpu" else set())
        if not needed <= names:
            report.serves, report.reason = False, "VLLM_PLUGINS leaves the plugin out"
            result.problems.append(
                f"VLLM_PLUGINS={allowed} leaves out {', '.join(sorted(needed - names))}: unset it, or add them to the list"
            )
    if environ.get("VLLM_TARGET_DEVICE", "").lower() == "cpu":
        report.serves, report.reason = False, "VLLM_TARGET_DEVICE=cpu bypasses the CPU platform"
        result.problems.append(
            "VLLM_TARGET_DEVICE=cpu makes vLLM skip platform plugins, so dsv4's CPU platform never starts: unset it"
        )


def _check_sglang_environment(result: Diagnosis, report: EngineReport, environ: Mapping[str, str]) -> None:
    """SGLang's own variables that silently keep the plugin, or its CPU platform, out."""
    on_cpu = result.devices[0].kind == "cpu"
    allowed = environ.get("SGLANG_PLUGINS")
    if allowed:
        needed = {"dsv4"} | ({"dsv4_cpu"} if on_cpu else set())
        absent = needed - {name.strip() for name in allowed.split(",")}
        if absent:
            report.serves, report.reason = False, "SGLANG_PLUGINS leaves the plugin out"
            result.problems.append(
                f"SGLANG_PLUGINS={allowed} leaves out {', '.join(sorted(absent))}: unset it, or add them to the list"
            )
    chosen = environ.get("SGLANG_PLATFORM")
    if chosen and chosen != "dsv4_cpu":
        report.serves, report.reason = False, "SGLANG_PLATFORM leaves the plugin out"
        result.problems.append(
            f"SGLANG_PLATFORM={chosen} makes SGLang skip every other package with a platform, dsv4 with it: unset it"
        )
    if on_cpu and environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        report.serves, report.reason = False, "SGLANG_USE_CPU_ENGINE=1 wants SGLang's own CPU kernels"
        result.problems.append(
            "SGLANG_USE_CPU_ENGINE=1 makes SGLang import CPU kernels that its published wheel does not have: unset it"
        )


def _entry_point(group: str, name: str) -> str | None:
    for entry_point in importlib.metadata.entry_points(group=group):
        if entry_point.name == name:
            return entry_point.value
    return None


# --------------------------------------------------------------------------------------------
# The server


def _check_server(result: Diagnosis, url: str, api_key: str | None) -> None:
    base = _base_url(url)
    result.server = ServerReport(base)
    try:
        code, body = _get(base + STATUS_ROUTE, api_key)
    except _NO_ANSWER as e:
        reason = e.reason if isinstance(e, urllib.error.URLError) else e
        result.problems.append(_unreachable(base, reason))
        return
    if code in (401, 403):
        result.problems.append(_unauthorised(base, code, api_key))
        return
    if code == 404:
        result.problems.append(_no_route(base, api_key))
        return
    raw = _parse(body)
    if code != 200 or raw is None:
        result.problems.append(
            f"{base}{STATUS_ROUTE} answered HTTP {code} without a status object; read the server's log"
        )
        return
    try:
        status = result.server.status = ServerStatus.from_json(raw)
    except StatusError as e:
        result.problems.append(f"{base}: {e}")
        return
    problem = _judge(base, status)
    if problem:
        result.problems.append(problem)
    else:
        result.server.serving = True


def _base_url(url: str) -> str:
    """`url` without a trailing slash or /v1. Raises Dsv4Error."""
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or too large
        valid = False
    if not valid:
        raise Dsv4Error(f"--url {url}: expected an address such as http://localhost:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def _get(url: str, api_key: str | None) -> tuple[int, bytes]:
    """(HTTP status, body). Raises one of _NO_ANSWER when nobody answers."""
    local = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    # A proxy would be asked for our own machine otherwise.
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
    try:
        request = urllib.request.Request(url)  # noqa: S310  `_base_url` admits http and https alone
        if api_key:
            request.add_unredirected_header("Authorization", f"Bearer {api_key}")  # for this server alone
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            return int(response.status), response.read(_MAX_BYTES)
    except urllib.error.HTTPError as e:
        return e.code, e.read(_MAX_BYTES)


def _unreachable(base: str, reason: object) -> str:
    if isinstance(reason, ConnectionRefusedError):
        return (
            f"nothing listens at {base} (connection refused): start the server, or wait until its log says it is ready"
        )
    if isinstance(reason, TimeoutError):
        return (
            f"{base} did not answer within {_TIMEOUT_S:.0f} s: it may still be loading; look at its log and try again"
        )
    return f"{base} cannot be reached ({reason}): check the address"


def _unauthorised(base: str, code: int, api_key: str | None) -> str:
    if api_key:
        return f"{base} does not take this API key (HTTP {code}): give the one that the server was started with"
    return (
        f"{base} asks for an API key (HTTP {code}): give the server's with --api-key, or in {env.API_KEY}, which no"
        " process list shows"
    )


def _no_route(base: str, api_key: str | None) -> str:
    """Why a server has no status route, as far as it tells."""
    who = f"a server answers at {base}"
    for product, path in (("vLLM", "/version"), ("SGLang", "/server_info")):
        try:
            code, body = _get(base + path, api_key)
        except _NO_ANSWER:
            break
        version = (_parse(body) or {}).get("version") if code == 200 else None
        if version:
            who = f"{product} {version} answers at {base}"
            break
    return (
        f"{who}, but has no {STATUS_ROUTE}: dsv4's plugin is not active there (the native model, or none, is serving);"
        " run `dsv4 doctor` with the server's own interpreter and environment, then restart the server with DSV4_MODE=on"
    )


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _judge(base: str, status: ServerStatus) -> str | None:
    """What is wrong with a server's own report; None when every worker runs our classes."""
    if not status.workers:
        return f"{base} has the plugin, but no worker reported: the model may still be loading; try again, then read its log"
    if status.foreign:
        found = sorted({w.model_class for w in status.foreign})
        return (
            f"{len(status.foreign)} of {len(status.workers)} workers at {base} run {', '.join(found)}, not dsv4's model;"
            " its log has one line with the reason; DSV4_MODE=on forces dsv4"
        )
    return None
