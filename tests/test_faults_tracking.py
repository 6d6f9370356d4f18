"""A real MLflow server behind a proxy that answers 500, hangs, cuts answers off, refuses, and comes back."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from launching import free_port
from test_tracking import DATA, TAGS, config_for, make_run, wait_for, write_rows

from repa_scale.run_folder import read_metrics
from repa_scale.tracking import numbers, open_tracker

mlflow = pytest.importorskip("mlflow")
pytestmark = [pytest.mark.faults, pytest.mark.distributed]


class Proxy:
    """Hands requests on to `port`, unless `mode` says otherwise: pass, error (500), hang, swallow (the server does it,
    the client gets no answer)."""

    def __init__(self, port):
        self.port, self.mode, self.seen = port, "pass", 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self):
                proxy.seen += 1
                mode = proxy.mode
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if mode == "error":
                    return self.answer(500, b'{"error_code": "INTERNAL_ERROR", "message": "laid by the test"}')
                if mode == "hang":
                    while proxy.mode == "hang":
                        time.sleep(0.05)
                    self.close_connection = True
                    return None
                connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=30)
                try:
                    headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                    connection.request(self.command, self.path, body, headers)
                    answer = connection.getresponse()
                    data = answer.read()
                except OSError:
                    return self.answer(502, b"{}")
                if mode == "swallow":
                    self.close_connection = True
                    return None
                return self.answer(answer.status, data, answer.getheader("Content-Type", "application/json"))

            def answer(self, status, data, kind="application/json"):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "art")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)

    def answers():
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False

    proxy = Proxy(port)
    try:
        wait_for(answers, 120)
        yield proxy
    finally:
        proxy.mode = "pass"
        proxy.server.shutdown()
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def stored(proxy, run):
    """Every point of the server's run: {(key, step, timestamp): value}; fails where one is there twice."""
    client = mlflow.MlflowClient(f"http://127.0.0.1:{proxy.port}")
    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    points = {}
    for key in client.get_run(run_id).data.metrics:
        for metric in client.get_metric_history(run_id, key):
            where = (metric.key, metric.step, metric.timestamp)
            assert where not in points, "a point is there twice"
            points[where] = metric.value
    return points


def written(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(key, row["step"], int(row["time"] * 1000)): value for row in rows for key, value in numbers(row).items()}


@pytest.mark.parametrize("fault", ["error", "hang", "swallow"])
def test_a_server_that_misbehaves_costs_nothing_and_loses_nothing(proxy, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("repa_scale.tracking.RETRY_SECONDS", (0.2, 0.5))
    monkeypatch.setattr("repa_scale.tracking.FINISH_SECONDS", 90.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = make_run(tmp_path / "run")
    proxy.mode = fault  # from the start: not even the run can be made
    tracker = open_tracker(config_for(proxy.uri), run, TAGS, DATA)
    seconds, seen = [], proxy.seen

    def tell(step):
        began = time.perf_counter()
        tracker.log(step, {}, 0.0)
        seconds.append(time.perf_counter() - began)

    for step in range(1, 40):
        write_rows(run, [step])
        tell(step)
        time.sleep(0.01)
    wait_for(lambda: proxy.seen > seen + 1)
    proxy.mode = "pass"
    wait_for(lambda: (run / "mlflow.json").exists() and json.loads((run / "mlflow.json").read_text())["sent_bytes"] > 0)
    proxy.mode, seen = fault, proxy.seen
    write_rows(run, range(40, 60))
    tell(59)
    wait_for(lambda: proxy.seen > seen)
    write_rows(run, range(45, 50), attempt=2)  # steps that a resumed run repeats: both points stay, with their attempts
    tell(49)
    proxy.mode = "pass"
    tracker.finish("completed")
    points = stored(proxy, run)
    assert points == written(run)
    assert max(seconds) < 0.1
    assert {value for (key, step, _), value in points.items() if key == "attempt" and step == 45} == {1.0, 2.0}
    assert [row["attempt"] for row in read_metrics(run) if row["step"] in (44, 45, 49, 50)] == [1, 2, 2, 1]


def test_a_run_that_was_killed_is_sent_by_the_next_start(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("repa_scale.tracking.RETRY_SECONDS", (0.2, 0.5))
    run = make_run(tmp_path / "run")
    write_rows(run, range(1, 30))
    proxy.mode = "pass"
    first = open_tracker(config_for(proxy.uri), run, TAGS, DATA)
    first.log(29, {}, 0.0)
    wait_for(lambda: (run / "mlflow.json").exists() and json.loads((run / "mlflow.json").read_text())["sent_bytes"] > 0)
    cursor = json.loads((run / "mlflow.json").read_text())
    # As a kill between the sending and the note of it leaves the cursor: everything is sent once more.
    (run / "mlflow.json").write_text(json.dumps({**cursor, "sent_bytes": 0}))
    write_rows(run, range(30, 40), attempt=2)
    open_tracker(config_for(proxy.uri), run, TAGS, DATA).finish("completed")
    assert stored(proxy, run) == written(run)
