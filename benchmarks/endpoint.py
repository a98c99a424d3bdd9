"""Loads the endpoint with 32 clients, and compares its throughput with that of one client.

python -m benchmarks.endpoint [MODEL_DIR] [--seconds 30]

The exit status is 1 where requests failed or the ratio of the two is too low.
"""

import argparse
import base64
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).parents[1]
NUM_CLIENTS = 32
MIN_RATIO = 1.5
CORES = 2
NUM_TAGS = 12


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir", nargs="?", help="A trained folder; by default a new ResNet-18 at 112 px.")
    parser.add_argument("--seconds", type=float, default=30)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # for the server and the clients together
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:CORES]))
    with tempfile.TemporaryDirectory() as folder:
        model_dir = args.model_dir or make_model(Path(folder) / "model")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = subprocess.Popen(
            [sys.executable, "-m", "magneto_training.serve", str(model_dir), "--port", str(port)],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until_it_serves(port)
            bodies = make_bodies()
            run_clients(port, bodies, 2, seconds=2)  # warms up
            measured = {clients: run_clients(port, bodies, clients, args.seconds) for clients in (1, NUM_CLIENTS)}
        finally:
            server.terminate()
            server.wait()
    print("| clients | requests/s | median ms | 95 % within ms | errors |")
    print("|---|---|---|---|---|")
    rates = {}
    for clients, (latencies, errors) in measured.items():
        rates[clients] = len(latencies) / args.seconds
        percentiles = [1000 * value for value in statistics.quantiles(latencies, n=20)]
        print(f"| {clients} | {rates[clients]:.1f} | {percentiles[9]:.0f} | {percentiles[18]:.0f} | {len(errors)} |")
        for error in sorted(set(errors)):
            print(f"error: {error}", file=sys.stderr)
    ratio = rates[NUM_CLIENTS] / rates[1]
    print(f"\nratio {ratio:.2f}, expected at least {MIN_RATIO}")
    if ratio < MIN_RATIO or any(errors for _, errors in measured.values()):
        sys.exit(1)


def make_model(folder: Path) -> Path:
    """Saves a model with random weights as train.py would."""
    from magneto_training.trainer import copy_endpoint
    from modeling_magneto import MagnetoConfig, MagnetoForTagSummarization, MagnetoProcessor

    tags = [f"tag {number}" for number in range(81)]
    MagnetoForTagSummarization(MagnetoConfig(vocab_size=len(tags) + 2)).save_pretrained(folder)
    MagnetoProcessor.from_vocabulary(tags).save_pretrained(folder)
    copy_endpoint(folder)
    return folder


def make_bodies(count: int = 16) -> list[bytes]:
    """Requests with photographs of natural size in pixels and bytes."""
    random = np.random.default_rng(0)
    bodies = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 255, (75, 100, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        labels = [f"tag {number}" for number in random.choice(81, NUM_TAGS, replace=False)]
        request = {
            "inputs": base64.b64encode(file.getvalue()).decode(),
            "parameters": {"candidate_labels": labels},
        }
        bodies.append(json.dumps(request).encode())
    return bodies


def wait_until_it_serves(port: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def run_clients(port: int, bodies: list[bytes], clients: int, seconds: float) -> tuple[list[float], list[str]]:
    """Each client sends one request after the other; returns the seconds of each request, and the errors."""
    latencies: list[float] = []
    errors: list[str] = []
    deadline = time.monotonic() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while (start := time.monotonic()) < deadline:
            number += 1
            try:
                body = bodies[number % len(bodies)]
                connection.request("POST", "/", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                answer = response.read()
                if response.status != 200 or len(json.loads(answer)) != NUM_TAGS:
                    errors.append(f"status {response.status}: {answer[:200].decode()}")
            except OSError as error:
                errors.append(repr(error))
                connection.close()
            else:
                latencies.append(time.monotonic() - start)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies, errors


if __name__ == "__main__":
    main()
