"""One API server on 127.0.0.1: two clients at once, killed, started again. `make test-vllm` runs this."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm_runs import NO_VLLM, vllm_is_there

if not vllm_is_there():
    pytest.skip(NO_VLLM, allow_module_level=True)

START_S = 300  # on a machine that does other things, too
PROMPTS = [[3, 10, 17, 24, 31], [11, 400, 23, 99, 250, 7]]


@contextlib.contextmanager
def server(model: Path, log: Path) -> Iterator[str]:
    """An API server; killed at the end, with all that it started."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    sizes = [
        "--max-model-len",
        "256",
        "--max-num-seqs",
        "4",
        "--max-num-batched-tokens",
        "256",
        "--enforce-eager",
    ]
    code = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--host",
        "127.0.0.1",
    ]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2", "MOESTRO_VLLM": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [*code, "--port", str(port), *sizes], stdout=out, stderr=out, env=env, start_new_session=True
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
            if answer.status == 200:
                return
        time.sleep(0.5)
    pytest.fail(f"no server after {START_S} s: {log.read_text()[-4000:]}")


def complete(url: str, prompt: list[int]) -> str:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    models = json.loads(urllib.request.urlopen(f"{url}/v1/models", timeout=30).read())
    body["model"] = models["data"][0]["id"]
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer: dict[str, Any] = json.loads(urllib.request.urlopen(request, timeout=60).read())
    return str(answer["choices"][0]["text"])


@pytest.mark.timeout(900)
def test_two_clients_at_once_and_a_killed_server_started_again(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    import tiny_models

    model = models("qwen3-modelopt")
    tiny_models.tokenizer(model)
    answers = []
    for start in range(2):
        log = tmp_path / f"server{start}.log"
        with server(model, log) as url, ThreadPoolExecutor(2) as clients:
            answers.append(list(clients.map(lambda prompt: complete(url, prompt), PROMPTS)))
        assert "moestro: serves nvfp4 experts" in log.read_text()
    assert answers[0] == answers[1]
    assert all(len(text.split()) == 16 for text in answers[0]), answers
