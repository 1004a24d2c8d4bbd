# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import http.server
import json
import socket
import threading
from dataclasses import dataclass, field, replace

import pytest

from dsv4.cli import main as cli
from dsv4.errors import Dsv4Error
from dsv4.machine import compat, decide
from dsv4.machine.decide import Device
from dsv4.proof import doctor
from dsv4.proof.doctor import ServerReport, diagnose
from dsv4.proof.status import Acceptance, ServedOp, ServerStatus, WorkerStatus

WORKER = WorkerStatus(
    rank=0,
    engine_version="0.32.0",
    model_class="dsv4_vllm.model.DeepseekV4ForCausalLM",
    served_by_dsv4=True,
    attention_backends=("DSV4_ENTRY", "DSV4_WINDOW"),
    model_runner="vllm.v1.worker.cpu_model_runner.CPUModelRunner",
    cache_class="dsv4_vllm.caches.V4Cache",
    kv_format="plain",
    index_format="plain",
    quant_method="dsv4_vllm.quant.V4QuantConfig",
    device="cpu",
    dtype="float32",
    ops={"mhc.pre": ServedOp("reference", "no GPU")},
    draft_class=None,
    drafted=0,
)
STATUS = ServerStatus(engine="vllm", engine_version="0.32.0", dsv4_version="0.1.0", workers=(WORKER,), acceptance=None)


def body(status: ServerStatus = STATUS, **changed: object) -> bytes:
    """What a server answers; changed: keys of the JSON to replace."""
    return json.dumps(status.to_json() | changed).encode()


@dataclass
class Machine:
    """What the doctor will see; by default vLLM with everything in place and no GPU."""

    versions: dict = field(default_factory=lambda: {"vllm": "0.32.0"})
    devices: tuple = (Device("cpu", "CPU"),)
    entry_points: bool = True
    plugins: tuple = ("dsv4_vllm", "dsv4_sglang")


@pytest.fixture
def machine(monkeypatch):
    m = Machine()
    monkeypatch.setattr(compat, "installed_version", lambda engine: m.versions.get(engine))
    monkeypatch.setattr(decide, "detect_devices", lambda environ=None: m.devices)
    monkeypatch.setattr(doctor, "_entry_point", lambda group, name: "dsv4_vllm:register" if m.entry_points else None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object() if name in m.plugins else None)
    for name in (
        "VLLM_PLUGINS",
        "VLLM_TARGET_DEVICE",
        "SGLANG_PLUGINS",
        "SGLANG_PLATFORM",
        "SGLANG_USE_CPU_ENGINE",
        *cli.env.VARIABLES,
    ):
        monkeypatch.delenv(name, raising=False)
    return m


def only_problem(result) -> str:
    (problem,) = result.problems
    return problem


def test_a_machine_in_order_has_no_problem_and_says_who_serves(machine):
    result = diagnose()
    assert result.ok
    assert result.engines["vllm"].serves
    assert "native V4 does not run on cpu" in result.engines["vllm"].reason


def test_a_gpu_that_serves_no_v4_is_a_problem(machine):
    machine.devices = (Device("cuda", "Tesla T4", (7, 5)),)
    result = diagnose()
    assert "Tesla T4 is sm75" in only_problem(result)
    assert not result.engines["vllm"].serves


def test_native_is_left_in_place_where_it_runs(machine):
    machine.devices = (Device("cuda", "H100", (9, 0)),)
    result = diagnose()
    assert result.ok
    assert not result.engines["vllm"].serves


def test_unsupported_version_is_a_problem_with_the_fix(machine):
    machine.versions = {"vllm": "0.30.0"}
    result = diagnose()
    assert "vLLM 0.30.0 is outside the range" in only_problem(result)
    assert not result.engines["vllm"].serves


def test_unsupported_version_is_no_problem_when_allowed(machine):
    machine.versions = {"vllm": "0.30.0"}
    result = diagnose(environ={"DSV4_ALLOW_UNTESTED": "1"})
    assert result.ok
    assert result.engines["vllm"].serves


def test_plugin_that_the_engine_cannot_find_is_a_problem(machine):
    machine.entry_points = False
    result = diagnose()
    assert "vllm.general_plugins:dsv4 are not installed" in only_problem(result)
    assert not result.engines["vllm"].serves


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"DSV4_MOED": "on"}, "did you mean DSV4_MODE?"),
        ({"DSV4_MODE": "maybe"}, "DSV4_MODE=maybe: expected one of auto, on, off"),
        ({"VLLM_PLUGINS": "lora_resolver"}, "leaves out dsv4, dsv4_cpu"),
        ({"VLLM_PLUGINS": "dsv4"}, "leaves out dsv4_cpu"),
        ({"VLLM_TARGET_DEVICE": "cpu"}, "unset it"),
    ],
)
def test_variables_that_keep_the_plugin_out_are_problems(machine, environ, message):
    assert message in only_problem(diagnose(environ=environ))


def test_vllm_plugins_that_name_ours_are_fine(machine):
    assert diagnose(environ={"VLLM_PLUGINS": "dsv4, dsv4_cpu"}).ok


def test_mode_off_is_obeyed_and_said(machine):
    result = diagnose(environ={"DSV4_MODE": "off"})
    assert result.ok
    assert "DSV4_MODE=off" in result.engines["vllm"].reason


def test_cpu_platform_off_means_that_nothing_serves_on_a_cpu(machine):
    assert not diagnose(environ={"DSV4_CPU_PLATFORM": "off"}).engines["vllm"].serves


def test_a_machine_without_engines_is_fine_for_planning(machine):
    machine.versions = {}
    result = diagnose()
    assert result.ok
    assert "planning and checking work" in result.notes[0]


def test_an_engine_without_our_plugin_is_said_and_no_problem(machine):
    machine.versions, machine.plugins = {"sglang": "0.5.23"}, ("dsv4_vllm",)
    result = diagnose()
    assert result.ok
    assert "no plugin for sglang yet" in result.engines["sglang"].reason


def test_sglang_in_order_serves(machine):
    machine.versions = {"sglang": "0.5.23"}
    result = diagnose(environ={"SGLANG_PLUGINS": "dsv4,dsv4_cpu", "SGLANG_PLATFORM": "dsv4_cpu"})
    assert result.ok
    assert result.engines["sglang"].serves


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SGLANG_PLUGINS": "other"}, "leaves out dsv4, dsv4_cpu"),
        ({"SGLANG_PLUGINS": "dsv4"}, "leaves out dsv4_cpu"),
        ({"SGLANG_PLATFORM": "other"}, "SGLANG_PLATFORM=other makes SGLang skip"),
        ({"SGLANG_USE_CPU_ENGINE": "1"}, "does not have: unset it"),
    ],
)
def test_sglang_variables_that_keep_the_plugin_out_are_problems(machine, environ, message):
    machine.versions = {"sglang": "0.5.23"}
    result = diagnose(environ=environ)
    assert message in only_problem(result)
    assert not result.engines["sglang"].serves


# --------------------------------------------------------------------------------------------
# A server


keys: dict[int, str] = {}  # the API key that the server on a port asks for


def test_sglang_without_compilers_on_a_gpu_is_a_problem(machine, tmp_path):
    """Before a start, which would refuse. Not where native serves, nor on a CPU."""
    machine.versions, machine.devices = {"sglang": "0.5.23"}, (Device("cuda", "A100", (8, 0)),)
    environ = {"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}
    result = diagnose(environ=environ)
    assert only_problem(result).startswith(f"nvcc ({tmp_path}/bin/nvcc) and ninja not found: SGLang compiles Marlin")
    assert not result.engines["sglang"].serves
    machine.devices = (Device("cuda", "H100", (9, 0)),)
    assert diagnose(environ=environ).ok
    machine.devices = (Device("cpu", "CPU"),)
    assert diagnose(environ=environ).ok


@pytest.fixture
def locked(server):
    """The server, now with the key "secret"."""
    port = int(server[0].rsplit(":", 1)[1])
    keys[port] = "secret"
    yield server
    del keys[port]


@pytest.fixture
def server():
    """Serve fixed answers: routes[path] = (HTTP status, body)."""
    routes: dict[str, tuple[int, bytes]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            code, body = routes.get(self.path, (404, b'{"detail":"Not Found"}'))
            if (wanted := keys.get(self.server.server_port)) and self.headers["Authorization"] != f"Bearer {wanted}":
                code, body = 401, b'{"error":"Unauthorized"}'
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", routes
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_a_server_that_runs_our_classes_is_proved(machine, server):
    url, routes = server
    routes["/dsv4/status"] = (200, body())
    result = diagnose(url)
    assert result.ok
    assert result.server == ServerReport(url, serving=True, status=STATUS)


@pytest.mark.parametrize("suffix", ["/", "/v1", "/v1/"])
def test_the_openai_address_of_the_server_works_too(machine, server, suffix):
    url, routes = server
    routes["/dsv4/status"] = (200, body())
    assert diagnose(url + suffix).server.serving


@pytest.mark.parametrize("variable", ["DSV4_API_KEY", "VLLM_API_KEY", None])
def test_a_server_with_an_api_key_is_asked_with_it(machine, locked, variable):
    url, routes = locked
    routes["/dsv4/status"] = (200, body())
    result = diagnose(url, environ={variable: "secret"} if variable else {}, api_key=None if variable else "secret")
    assert result.ok, result.problems
    assert result.server.serving
    assert "secret" not in repr(result)


def test_an_api_key_that_is_missing_or_wrong_is_told(machine, locked):
    url, _ = locked
    assert "asks for an API key (HTTP 401): give the server's with --api-key" in only_problem(diagnose(url, environ={}))
    problem = only_problem(diagnose(url, environ={}, api_key="guess"))
    assert "does not take this API key (HTTP 401)" in problem
    assert "guess" not in problem


def test_an_api_key_is_not_sent_on_to_another_server(machine, server):
    """A redirect leads anywhere."""

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/dsv4/status":
                self.send_response(302)
                self.send_header("Location", f"{server[0]}/taken")
                self.end_headers()

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    port = int(server[0].rsplit(":", 1)[1])
    keys[port] = "secret"
    diagnosis = diagnose(f"http://127.0.0.1:{httpd.server_port}", environ={}, api_key="secret")
    httpd.shutdown()
    httpd.server_close()
    del keys[port]
    assert "HTTP 401" in only_problem(diagnosis)  # the key did not reach the second server


def test_a_proxy_is_not_asked_for_this_machine(machine, server, monkeypatch):
    url, routes = server
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    routes["/dsv4/status"] = (200, body())
    assert diagnose(url).ok


def test_a_server_without_the_route_is_native_or_has_no_plugin(machine, server):
    url, routes = server
    routes["/version"] = (200, b'{"version": "0.32.0"}')
    problem = only_problem(diagnose(url))
    assert f"vLLM 0.32.0 answers at {url}, but has no /dsv4/status" in problem
    assert "DSV4_MODE=on" in problem


def test_an_sglang_server_without_the_route_is_named(machine, server):
    url, routes = server
    routes["/server_info"] = (200, b'{"version": "0.5.23"}')
    assert f"SGLang 0.5.23 answers at {url}, but has no /dsv4/status" in only_problem(diagnose(url))


def test_a_server_that_is_something_else_is_said(machine, server):
    url, _ = server
    assert f"a server answers at {url}, but has no /dsv4/status" in only_problem(diagnose(url))


def test_a_worker_with_another_model_class_is_a_problem(machine, server):
    url, routes = server
    native = replace(
        WORKER, rank=1, model_class="vllm.models.deepseek_v4.nvidia.model.DeepseekV4ForCausalLM", kv_format=None
    )
    routes["/dsv4/status"] = (200, body(replace(STATUS, workers=(WORKER, native))))
    result = diagnose(url)
    assert "1 of 2 workers" in only_problem(result)
    assert native.model_class in only_problem(result)
    assert not result.server.serving


@pytest.mark.parametrize("workers", [[], None, ["garbage"]])
def test_a_plugin_without_workers_is_a_problem(machine, server, workers):
    url, routes = server
    routes["/dsv4/status"] = (200, body(workers=workers))
    assert "no worker reported" in only_problem(diagnose(url))


def test_a_server_of_another_dsv4_is_told_apart_from_a_broken_one(machine, server):
    url, routes = server
    told = STATUS.to_json()
    del told["workers"][0]["quant_method"]
    routes["/dsv4/status"] = (200, json.dumps(told).encode())
    assert "lacks quant_method: it runs another version of dsv4" in only_problem(diagnose(url))


def test_keys_of_a_newer_dsv4_are_left_out(machine, server):
    url, routes = server
    routes["/dsv4/status"] = (200, body(schema_version=2, uptime_s=5))
    assert diagnose(url).server == ServerReport(url, serving=True, status=STATUS)


@pytest.mark.parametrize("answer", [(200, b"<html>"), (200, b"[]"), (500, b"{}"), (418, b"")])
def test_an_answer_that_is_no_status_is_a_problem(machine, server, answer):
    url, routes = server
    routes["/dsv4/status"] = answer
    assert f"answered HTTP {answer[0]} without a status object" in only_problem(diagnose(url))


def test_nobody_listening_is_said_so(machine):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"
    assert "connection refused" in only_problem(diagnose(url))


def test_a_server_that_never_answers_is_said_so(machine, monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.2)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        assert "did not answer" in only_problem(diagnose(f"http://127.0.0.1:{s.getsockname()[1]}"))


def test_something_else_than_http_is_said_so(machine):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()

        def answer():
            connection, _ = s.accept()
            connection.recv(4096)
            connection.sendall(b"SSH-2.0-OpenSSH\r\n")
            connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        assert "cannot be reached" in only_problem(diagnose(f"http://127.0.0.1:{s.getsockname()[1]}"))
        thread.join()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:99999", "http://x:port", ""])
def test_a_malformed_address_is_bad_input(machine, url):
    with pytest.raises(Dsv4Error, match="expected an address such as"):
        diagnose(url)


# --------------------------------------------------------------------------------------------
# The command


def run(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        cli.main(["doctor", *args])
    return caught.value.code, capsys.readouterr()


def test_command_exits_0_and_prints_what_serves(machine, server, capsys):
    url, routes = server
    routes["/dsv4/status"] = (200, body())
    code, captured = run(capsys, "--url", url)
    assert code == 0
    for part in (
        "dsv4 is serving",
        "dsv4_vllm.model.DeepseekV4ForCausalLM",
        "quantisation dsv4_vllm.quant.V4QuantConfig",
        "DSV4_WINDOW",
        "mhc.pre",
        "reference: no GPU",
    ):
        assert part in captured.out


def test_a_server_that_drafts_says_how_many_are_kept(machine, server, capsys):
    drafting = replace(WORKER, draft_class="dsv4_vllm.draft.DeepSeekV4MTP", drafted=3)
    acceptance = Acceptance(tokens_per_step=1.84, by_position=(0.5, 0.25, 0.09))
    url, routes = server
    routes["/dsv4/status"] = (200, body(replace(STATUS, workers=(drafting,), acceptance=acceptance)))
    code, captured = run(capsys, "--url", url)
    assert code == 0
    printed = " ".join(captured.out.split())
    assert "drafts: 1.84 tokens a step; kept by position 50%, 25%, 9%" in printed
    assert "drafts 3 tokens a step by dsv4_vllm.draft.DeepSeekV4MTP" in printed


@pytest.mark.parametrize("acceptance", [{}, {"tokens_per_step": "many", "by_position": None}, [1]])
def test_an_acceptance_that_is_none_is_a_problem(machine, server, acceptance):
    url, routes = server
    routes["/dsv4/status"] = (200, body(acceptance=acceptance))
    assert any("acceptance of drafts is malformed" in p for p in diagnose(url).problems)


def test_command_exits_1_and_prints_the_next_step(machine, server, capsys):
    url, _ = server
    code, captured = run(capsys, "--url", url)
    assert code == 1
    assert "PROBLEM" in captured.out
    assert "restart the server with DSV4_MODE=on" in captured.out


def test_command_prints_json(machine, capsys):
    machine.entry_points = False
    code, captured = run(capsys, "--json")
    report = json.loads(captured.out)
    assert report["schema_version"] == 1
    assert code == 1
    assert (report["ok"], report["engines"]["vllm"]["version"]) == (False, "0.32.0")
    assert report["problems"]


def test_command_with_a_malformed_address_exits_2(machine, capsys):
    code, captured = run(capsys, "--url", "nonsense")
    assert (code, captured.out) == (2, "")
