import concurrent.futures
import http.client
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest
import uvicorn
from small_endpoint import as_base64, as_bytes, bomb, photograph, save_model

from magneto_training import serve
from magneto_training.arguments import UserError
from magneto_training.serve import MAX_BODY_BYTES, create_app, load_handler

LABELS = ["red", "blue", "green"]
GOOD = json.dumps({"inputs": as_base64(photograph()), "parameters": {"candidate_labels": LABELS}}).encode()


def run_server(app):
    """Runs the app in a thread; yields its port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture(scope="module")
def handler(tmp_path_factory):
    return load_handler(str(save_model(tmp_path_factory.mktemp("endpoint") / "model")))


@pytest.fixture(scope="module")
def port(handler):
    yield from run_server(create_app(handler))


def post(port: int, body: bytes, content_type: str | None = "application/json", query: str = "") -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {} if content_type is None else {"Content-Type": content_type}
    connection.request("POST", f"/{query}", body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def get(port: int, path: str, method: str = "GET") -> tuple[int, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def run_elsewhere(arguments: list[str], **environment) -> subprocess.CompletedProcess:
    environment = os.environ | {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0", **environment}
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)


# --------------------------------------------------------------------------------------------------------- the clients


def test_the_hubs_own_client_is_served(port, handler, tmp_path):
    (tmp_path / "photo.png").write_bytes(as_bytes(photograph()))
    script = """
import json, sys
from huggingface_hub import InferenceClient
client = InferenceClient(model=sys.argv[1])
found = client.zero_shot_image_classification(sys.argv[2], candidate_labels=["red", "blue", "green"])
print(json.dumps([[element.label, element.score] for element in found]))
try:
    client.zero_shot_image_classification(sys.argv[2], candidate_labels=["red", " "])
except Exception as error:
    print(error.response.status_code, error.response.json()["error"])
"""

    finished = run_elsewhere(
        [sys.executable, "-c", script, f"http://127.0.0.1:{port}", str(tmp_path / "photo.png")],
        HF_HOME=str(tmp_path / "home"),
    )

    assert finished.returncode == 0, finished.stderr
    answer, refusal = finished.stdout.splitlines()
    expected = handler({"inputs": photograph(), "parameters": {"candidate_labels": LABELS}})
    assert [label for label, _ in json.loads(answer)] == [item["label"] for item in expected]
    assert [score for _, score in json.loads(answer)] == pytest.approx([item["score"] for item in expected], abs=1e-5)
    assert refusal == "400 candidate_labels: found an empty tag, expected text"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl_is_served_with_json_and_with_a_photograph_itself(port, tmp_path):
    (tmp_path / "request.json").write_bytes(GOOD)
    (tmp_path / "photo.jpg").write_bytes(as_bytes(photograph(), "JPEG"))
    address = f"http://127.0.0.1:{port}/"
    query = urllib.parse.urlencode({"candidate_labels": "red,blue,green", "top_k": 1})

    from_json = run_elsewhere(
        ["curl", "-s", address, "-H", "Content-Type: application/json", "-d", f"@{tmp_path / 'request.json'}"]
    )
    from_jpeg = run_elsewhere(
        [
            *["curl", "-s", f"{address}?{query}", "-H", "Content-Type: image/jpeg"],
            *["--data-binary", f"@{tmp_path / 'photo.jpg'}"],
        ]
    )

    assert {item["label"] for item in json.loads(from_json.stdout)} == set(LABELS)
    assert [item["selected"] for item in json.loads(from_jpeg.stdout)] == [True, False, False]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_a_body_of_100_megabytes_is_refused(port, tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(100_000_000)
    command = ["curl", "-s", "-w", "%{http_code}", "-H", "Content-Type: application/json"]

    for header in ("Expect: 100-continue", "Transfer-Encoding: chunked"):
        finished = run_elsewhere(
            [*command, "-H", header, "--data-binary", f"@{tmp_path / 'large'}", f"http://127.0.0.1:{port}/"]
        )
        assert finished.stdout == f'{{"error":"the body is too large, expected at most {MAX_BODY_BYTES} bytes"}}413'
        assert post(port, GOOD)[0] == 200


# -------------------------------------------------------------------------------------------------------- bad requests


def as_request(inputs: object = None, **parameters) -> bytes:
    return json.dumps({"inputs": inputs or as_base64(photograph()), "parameters": parameters}).encode()


BAD_REQUESTS = {
    "no JSON": (b"{", "application/json", "", 400, "the body is no JSON"),
    "deep JSON": (b"[" * 200_000, "application/json", "", 400, "the body is no JSON"),
    "no text": (b"\xff\xfe", "application/json", "", 400, "the body is no JSON"),
    "empty": (b"", "application/json", "", 400, "the body is no JSON"),
    "a list": (b"[1]", "application/json", "", 400, "the request is of type list"),
    "no labels": (as_request(), "application/json", "", 400, "candidate_labels is missing"),
    "10,000 labels": (as_request(candidate_labels=["a"] * 10_000), "application/json", "", 400, "at most 500"),
    "no photograph": (
        as_request("bm90aGluZw==", candidate_labels=["a"]),
        "application/json",
        "",
        400,
        "no photograph",
    ),
    "private address": (
        as_request("http://169.254.169.254/", candidate_labels=["a"]),
        "application/json",
        "",
        400,
        "nothing is fetched",
    ),
    "a form": (b"a=b", "application/x-www-form-urlencoded", "", 415, "expected application/json or an image"),
    "no image": (b"nothing", "image/jpeg", "?candidate_labels=a", 400, "no photograph, expected one of JPEG"),
    "another format": (
        as_bytes(photograph(), "PPM"),
        "image/x-portable-pixmap",
        "?candidate_labels=a",
        400,
        "one of JPEG",
    ),
    "a large file": (bytes(20_000_001), "image/jpeg", "?candidate_labels=a", 400, "20000001 bytes, expected at most"),
    "no bytes": (b"", "image/jpeg", "?candidate_labels=a", 400, "no photograph"),
    "image without labels": (as_bytes(photograph()), "image/png", "", 400, "candidate_labels is missing"),
    "twice": (
        as_bytes(photograph()),
        "image/png",
        "?candidate_labels=a&top_k=1&top_k=2",
        400,
        "'top_k' is in the query 2 times, expected once",
    ),
    "bomb": (bomb(), "image/png", "?candidate_labels=a", 400, "10000 x 10000 pixels"),
    "cut short": (as_bytes(photograph())[:9000], "image/png", "?candidate_labels=a", 400, "cannot be decoded"),
}


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own word on the bomb
@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_has_a_reason_and_leaves_the_server_serving(port, name):
    body, content_type, query, expected_status, reason = BAD_REQUESTS[name]

    status, answer = post(port, body, content_type, query)

    assert status == expected_status
    assert set(answer) == {"error"} and reason in answer["error"] and "\n" not in answer["error"]
    assert post(port, GOOD)[0] == 200


def test_tags_in_the_query_may_be_one_parameter_or_several(port):
    several = urllib.parse.urlencode({"candidate_labels": LABELS, "top_k": 1}, doseq=True)
    assert several.count("candidate_labels") == 3

    answers = [
        post(port, as_bytes(photograph()), "image/png", f"?{query}")
        for query in (several, "candidate_labels=red,blue,green&top_k=1", "candidate_labels=red,blue&" + several)
    ]

    assert [status for status, _ in answers] == [200] * 3
    for _, answer in answers:
        assert {item["label"] for item in answer} == set(LABELS)
        assert [item["selected"] for item in answer] == [True, False, False]


def test_a_body_is_taken_for_json_where_nothing_is_said(port):
    status, answer = post(port, GOOD, content_type=None)

    assert status == 200 and len(answer) == 3


def test_health_and_wrong_addresses(port):
    found = {}
    for method, path in (("GET", "/health"), ("GET", "/nowhere"), ("PUT", "/")):
        found[method, path] = get(port, path, method)

    assert found["GET", "/health"] == (200, {"status": "ok"})
    assert found["GET", "/nowhere"] == (404, {"error": "Not Found"})
    assert found["PUT", "/"] == (405, {"error": "Method Not Allowed"})


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_there_are_no_pages_that_fetch_from_elsewhere(port, path):
    assert get(port, path) == (404, {"error": "Not Found"})


def test_our_own_failure_is_500_without_details():
    def fails(data):
        raise RuntimeError("secret")

    for port in run_server(create_app(fails)):
        assert post(port, GOOD) == (500, {"error": "the server has failed at this request"})


def test_many_clients_are_served_at_a_time(port):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(post(port, GOOD))) for _ in range(48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert [status for status, _ in answers] == [200] * 48
    scores = [[item["score"] for item in answer] for _, answer in answers]
    assert all(found == pytest.approx(scores[0], abs=1e-5) for found in scores)


def test_requests_beyond_the_places_wait_and_health_does_not(monkeypatch):
    monkeypatch.setattr(serve, "MAX_REQUESTS", 2)
    busy, running, most, released = threading.Semaphore(0), [], [], threading.Event()

    def handler(data):
        running.append(data)
        most.append(len(running))
        busy.release()
        assert released.wait(timeout=60)
        running.remove(data)
        return [data]

    for port in run_server(create_app(handler)):
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            try:
                answers = [threads.submit(post, port, json.dumps(number).encode()) for number in range(8)]
                assert busy.acquire(timeout=60) and busy.acquire(timeout=60)
                assert get(port, "/health") == (200, {"status": "ok"})
            finally:
                released.set()
            assert [answer.result(timeout=60) for answer in answers] == [(200, [number]) for number in range(8)]

    assert max(most) == 2


def test_a_client_that_does_not_send_its_body_gives_up_its_place(monkeypatch):
    monkeypatch.setattr(serve, "MAX_REQUESTS", 1)
    monkeypatch.setattr(serve, "MAX_BODY_SECONDS", 0.2)
    for port in run_server(create_app(lambda data: [data])):
        stalled = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        stalled.putrequest("POST", "/")
        stalled.putheader("Content-Length", "10")
        stalled.endheaders(b"1")

        assert post(port, b"5") == (200, [5])
        answer = stalled.getresponse()
        assert answer.status == 408
        assert json.loads(answer.read()) == {"error": "the body took more than 0.2 seconds"}


# --------------------------------------------------------------------------------------------------------- the command


def test_a_folder_without_a_handler_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no handler.py"):
        load_handler(str(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    save_model(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()

    with pytest.raises(UserError, match="cannot be loaded"):
        load_handler(str(tmp_path / "model"))


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    finished = run_elsewhere([sys.executable, "-m", "magneto_training.serve", str(tmp_path)], HF_HUB_OFFLINE="1")

    assert finished.returncode == 1
    assert len(finished.stderr.splitlines()) == 1
    assert finished.stderr.startswith("serve: error: ") and "handler.py" in finished.stderr


def test_the_command_names_the_extra_where_it_is_missing(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\")")

    command = [sys.executable, "-m", "magneto_training.serve", str(tmp_path)]
    finished = run_elsewhere(command, HF_HUB_OFFLINE="1", PYTHONPATH=str(tmp_path))

    expected = (
        """serve: error: the server needs the extra "serve": pip install -e ".[serve]" (No module named 'uvicorn')"""
    )
    assert (finished.returncode, finished.stderr) == (1, expected + "\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "DIR"),
        (["model", "--nothing"], "--nothing"),
        (["model", "--port", "http"], "'http'"),
        (["model", "--port", "65536"], "port is 65536, expected at most 65535"),
        (["model", "--port", "-1"], "port is -1"),
    ],
)
def test_wrong_arguments_end_the_command_with_one_line(monkeypatch, capsys, arguments, expected):
    monkeypatch.setattr(sys, "argv", ["serve.py", *arguments])

    with pytest.raises(SystemExit) as caught:
        serve.main()

    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("serve: error: ") and expected in line


def test_the_command_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--help"])

    with pytest.raises(SystemExit) as caught:
        serve.main()

    printed = capsys.readouterr()
    assert caught.value.code == 0 and printed.err == ""
    assert "python -m magneto_training.serve" in printed.out and "--port" in printed.out
