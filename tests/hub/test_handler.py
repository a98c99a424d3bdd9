import base64
import concurrent.futures
import io
import json
import os
import re
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import run_alone
from PIL import Image
from small_endpoint import as_base64, as_bytes, bomb, load_module, photograph, save_model
from transformers import pipeline

REPOSITORY = Path(__file__).parents[2]
LABELS = ["red", "Blue ", "blue", "unheard of"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("endpoint") / "model")


@pytest.fixture(scope="module")
def module(folder):
    return load_module(folder)


@pytest.fixture(scope="module")
def handler(module, folder):
    return module.EndpointHandler(str(folder))


@pytest.fixture(scope="module")
def summarizer(folder):
    return pipeline("tag-summarization", model=str(folder), trust_remote_code=True, device="cpu")


def request(inputs="photograph", labels=LABELS, **parameters) -> dict:
    inputs = as_base64(photograph()) if inputs == "photograph" else inputs
    return {"inputs": inputs, "parameters": {"candidate_labels": labels, **parameters}}


def assert_same(found: list[dict], expected: list[dict]):
    assert [item["label"] for item in found] == [item["label"] for item in expected]
    assert [item["score"] for item in found] == pytest.approx([item["score"] for item in expected], abs=1e-5, rel=0)
    assert [item["selected"] for item in found] == [item["selected"] for item in expected]


@pytest.mark.parametrize("kind", ["base64", "data URL", "PIL", "opened file"])
@pytest.mark.parametrize("labels", [LABELS, "red, Blue ,blue, unheard of,"])
def test_the_answer_is_the_pipelines_in_the_hubs_format(handler, summarizer, kind, labels):
    image = {
        "base64": as_base64(photograph()),
        "data URL": f"data:image/png;base64,{as_base64(photograph())}",
        "PIL": photograph(),
        "opened file": Image.open(io.BytesIO(as_bytes(photograph()))),
    }[kind]

    answer = handler(request(image, labels))

    assert_same(answer, summarizer(photograph(), candidate_labels=LABELS))
    assert json.loads(json.dumps(answer)) == answer


@pytest.mark.parametrize(
    "options, sent",
    [
        ({"top_k": 1}, {"top_k": "1"}),
        ({"threshold": 0.25}, {"threshold": "0.25"}),
        ({"threshold": 1}, {"threshold": 1}),
        ({"return_attention": True}, {"return_attention": "true"}),
        ({}, {"return_attention": "false", "threshold": None, "hypothesis_template": "a photo of {}"}),
    ],
)
def test_parameters_are_the_pipelines_arguments_also_as_texts(handler, summarizer, options, sent):
    expected = summarizer(photograph(), candidate_labels=LABELS, **options)

    for parameters in (options, sent):
        answer = handler(request(**parameters))

        assert_same(answer, expected)
        assert ["attention" in item for item in answer] == ["attention" in item for item in expected]
        for item, expected_item in zip(answer, expected, strict=True):
            assert sum(item.get("attention", []), []) == pytest.approx(
                sum(expected_item.get("attention", []), []), abs=1e-5
            )


def test_requests_that_come_while_the_model_is_busy_share_a_batch(handler, summarizer, monkeypatch):
    photographs = [photograph(seed, size=(50 + 9 * seed, 80)) for seed in range(12)]
    labels = [["red", "blue", "green", "sea", "sky"][: 1 + seed % 5] for seed in range(12)]
    forward, busy, batches = handler.pipeline.forward, threading.Event(), []

    def slow_forward(inputs, **options):
        batches.append(len(inputs["tags"]))
        assert busy.wait(timeout=60)
        return forward(inputs, **options)

    monkeypatch.setattr(handler.pipeline, "forward", slow_forward)
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        answers = [
            threads.submit(handler, request(image, tags, top_k=1 + index % 2))
            for index, (image, tags) in enumerate(zip(photographs, labels, strict=True))
        ]
        deadline = time.monotonic() + 60
        while sum(batches) + handler._prepared.qsize() < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        busy.set()
        answers = [answer.result(timeout=60) for answer in answers]

    assert sum(batches) == 12 and len(batches) == 2
    for index, answer in enumerate(answers):
        alone = summarizer(photographs[index], candidate_labels=labels[index], top_k=1 + index % 2)
        assert_same(answer, alone)


@pytest.mark.parametrize("streams", ["both", "tag"])
def test_a_shared_batch_is_what_the_processor_makes_of_all_requests(tmp_path, streams):
    folder = save_model(tmp_path / "model", streams)
    handler = load_module(folder).EndpointHandler(str(folder))
    photographs = [photograph(seed, size=(50 + 9 * seed, 80)) for seed in range(3)]
    labels = [["red"], ["blue", "green", "sea"], ["sky", "red"]]
    requests = [
        handler.pipeline.preprocess({"image": image, "candidate_labels": tags})
        for image, tags in zip(photographs, labels, strict=True)
    ]

    batch = handler._collate(requests)

    expected = handler.pipeline.processor(photographs, labels)
    assert batch.pop("tags") == labels
    assert batch.keys() == expected.keys()
    assert all(batch[name].dtype == expected[name].dtype for name in batch)
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_a_slow_photograph_holds_up_no_other_request(module, folder, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    handler = module.EndpointHandler(str(folder))
    preprocess, started, released = type(handler.pipeline).preprocess, threading.Event(), threading.Event()

    def preprocess_slowly(self, inputs):
        if inputs["candidate_labels"] == ["slow"]:
            started.set()
            assert released.wait(timeout=60)
        return preprocess(self, inputs)

    monkeypatch.setattr(type(handler.pipeline), "preprocess", preprocess_slowly)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        try:
            slow = threads.submit(handler, request(labels=["slow"]))
            assert started.wait(timeout=60)
            answers = [threads.submit(handler, request()).result(timeout=60) for _ in range(3)]
            assert not slow.done()
        finally:
            released.set()

    assert [len(answer) for answer in answers] == [3, 3, 3]
    assert [item["label"] for item in slow.result()] == ["slow"]


def test_a_failure_of_the_model_is_told_and_the_next_request_served(handler, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(handler.pipeline, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            handler(request())

    assert len(handler(request())) == 3


BAD_REQUESTS = {
    "no mapping": (["red"], "the request is of type list"),
    "text": ("red", "the request is of type str"),
    "no parameters": ({"inputs": as_base64(photograph())}, "candidate_labels is missing, expected a list of tags"),
    "parameters are a list": ({"inputs": "", "parameters": ["red"]}, "parameters is of type list"),
    "no labels": (request(labels=None), "candidate_labels is missing, expected a list of tags"),
    "empty labels": (request(labels=[]), "candidate_labels is empty"),
    "commas": (request(labels=" , ,"), "candidate_labels is empty"),
    "labels are a mapping": (request(labels={"red": 1}), "candidate_labels is of type dict"),
    "a label is a number": (request(labels=["red", 3]), "candidate_labels[1] is of type int"),
    "a label is empty": (request(labels=["red", " "]), "found an empty tag"),
    "a label is long": (request(labels=["red" * 100]), "candidate_labels[0] has 300 characters, expected at most 200"),
    "half a character": (request(labels=["\ud800"]), "candidate_labels[0] holds half a character"),
    "a line of pixels": (
        {"inputs": as_base64(Image.new("RGB", (40_000, 1))), "parameters": {"candidate_labels": ["red"]}},
        "a photograph has 40000 x 1 pixels, expected sides of at most 1 : 50",
    ),
    "10,000 labels": (request(labels=[f"tag {i}" for i in range(10_000)]), "found 10000 candidate_labels"),
    "unknown parameter": (request(treshold=0.5), "unknown parameter 'treshold'"),
    "threshold is text": (request(threshold="high"), "threshold is 'high', expected a number"),
    "threshold is a list": (request(threshold=[0.5]), "threshold is of type list, expected a number"),
    "threshold out of range": (request(threshold=7.0), "threshold is 7.0"),
    "threshold is nan": (request(threshold=float("nan")), "threshold is nan"),
    "top_k is true": (request(top_k=True), "top_k is of type bool, expected a whole number"),
    "top_k is a fraction": (request(top_k=1.5), "top_k is of type float, expected a whole number"),
    "top_k is text": (request(top_k="1.5"), "top_k is '1.5', expected a whole number"),
    "top_k is negative": (request(top_k=-1), "top_k is -1"),
    "threshold and top_k": (request(threshold=0.5, top_k=1), "threshold is 0.5 and top_k is 1, expected only one"),
    "unknown rule": (request(selection="best"), "'best'"),
    "rule is a number": (request(selection=1), "selection is of type int, expected text"),
    "attention is text": (request(return_attention="maybe"), "return_attention is 'maybe', expected true or false"),
    "attention is a number": (request(return_attention=1), "return_attention is of type int, expected true or false"),
    "no photograph": (request(inputs=None), "inputs is of type NoneType"),
    "inputs are a list": (request(inputs=[1, 2]), "inputs is of type list"),
    "no base64": (request(inputs="%%%"), "inputs is no base64 text"),
    "a path": (request(inputs=str(REPOSITORY / "docs" / "report.png")), "inputs is no"),
    "base64 of something else": (request(inputs=base64.b64encode(b"text" * 99).decode()), "inputs is no photograph"),
    "PostScript": (request(inputs=base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode()), "inputs is no photograph"),
    "cut short": (request(inputs=base64.b64encode(as_bytes(photograph())[:9000]).decode()), "cannot be decoded"),
    "too large a file": (
        request(inputs=base64.b64encode(bytes(20_000_001)).decode()),
        "the photograph has 20000001 bytes, expected at most 20000000",
    ),
    "as large as may be": (request(inputs=base64.b64encode(bytes(20_000_000)).decode()), "inputs is no photograph"),
    "decompression bomb": (request(inputs=base64.b64encode(bomb()).decode()), "has 10000 x 10000 pixels"),
    "file of another kind": (request(inputs=Image.open(io.BytesIO(as_bytes(photograph(), "PPM")))), "is PPM"),
}


@pytest.mark.filterwarnings("ignore:Image size")  # Pillow's own word on the bomb
@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_a_reason_and_the_next_one_served(handler, name):
    data, reason = BAD_REQUESTS[name]

    with pytest.raises(ValueError) as raised:
        handler(data)

    assert reason in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300
    assert len(handler(request())) == 3


def test_base64_may_have_line_breaks(handler):
    broken = base64.encodebytes(as_bytes(photograph())).decode()

    assert "\n" in broken.strip()
    assert handler({"inputs": broken, "parameters": {"candidate_labels": ["red", "blue"]}}) == handler(
        request(labels=["red", "blue"])
    )


def test_nothing_is_fetched_from_an_address(handler, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was made"))

    for address in ("http://127.0.0.1:1/photo.png", "https://169.254.169.254/latest/meta-data"):
        with pytest.raises(ValueError, match="nothing is fetched"):
            handler(request(inputs=address))


def test_a_tag_only_model_reads_no_photograph(tmp_path):
    folder = save_model(tmp_path / "model", streams="tag")
    handler = load_module(folder).EndpointHandler(str(folder))

    answers = [handler(request(inputs=inputs)) for inputs in ("photograph", None, "no photograph")]

    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 3


def test_the_handler_runs_where_only_the_folder_is(folder, tmp_path, summarizer):
    script = """
import sys, json
sys.path.insert(0, "model")
import handler
answer = handler.EndpointHandler("model")(json.load(open("request.json")))
assert not {"modeling_magneto", "magneto_training"} & set(sys.modules)
print(json.dumps(answer))
"""
    (tmp_path / "model").symlink_to(folder)
    (tmp_path / "request.json").write_text(json.dumps(request()))

    printed = run_alone(script, tmp_path)

    assert_same(json.loads(printed), summarizer(photograph(), candidate_labels=LABELS))


def test_the_endpoint_installs_what_the_project_demands(folder):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]

    requirements = (folder / "requirements.txt").read_text().split()

    assert requirements and set(requirements) <= set(project)
    assert all(re.fullmatch(r"[a-z_]+>=[\d.]+", line) for line in requirements)
