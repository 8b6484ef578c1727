"""One hub per process: idempotent, after a fork too, with nothing heavy imported."""

import json
import subprocess
import sys

START = """
import json, os, sys, time
began = time.perf_counter()
from metaflow_hf.demo.embedded import ensure_running
url = ensure_running()
took = time.perf_counter() - began
"""


def run(script: str, environment: dict[str, str]) -> dict:
    command = [sys.executable, "-W", "error", "-c", START + script]
    output = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, check=True, timeout=60
    )
    return json.loads(output.stdout.splitlines()[-1])


def test_it_starts_at_once_and_imports_nothing_heavy(subprocess_environment):
    found = run(
        """
heavy = {"torch", "transformers", "datasets", "huggingface_hub", "pydantic", "tokenizers", "metaflow", "numpy"}
print(json.dumps({"took": took, "heavy": sorted(heavy & set(sys.modules))}))
""",
        subprocess_environment,
    )
    assert found["heavy"] == []
    assert found["took"] < 0.5


def test_it_runs_once_and_points_the_environment_at_itself(subprocess_environment):
    found = run(
        """
names = ("HF_ENDPOINT", "METAFLOW_HF_EMBEDDED_ENDPOINT", "NO_PROXY", "no_proxy", "HF_HUB_DISABLE_XET")
again = ensure_running()
print(json.dumps({"url": url, "again": again, **{n: os.environ[n] for n in names}}))
""",
        {**subprocess_environment, "NO_PROXY": "internal.example", "no_proxy": "internal.example"},
    )
    assert found["url"] == found["again"] == found["HF_ENDPOINT"] == found["METAFLOW_HF_EMBEDDED_ENDPOINT"]
    assert found["NO_PROXY"] == found["no_proxy"] == "internal.example,127.0.0.1"
    assert found["HF_HUB_DISABLE_XET"] == "1"


def test_a_proxy_of_the_environment_is_not_asked(subprocess_environment):
    environment = {k: v for k, v in subprocess_environment.items() if k.lower() != "no_proxy"}
    found = run(
        """
import huggingface_hub
print(json.dumps(huggingface_hub.HfApi().model_info("metaflow-hf/tiny-llama").id))
""",
        {**environment, "HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"},
    )
    assert found == "metaflow-hf/tiny-llama"


def test_a_forked_child_has_its_own_and_the_parents_goes_on(subprocess_environment):
    found = run(
        """
import urllib.request
def ask(url):
    with urllib.request.urlopen(url + "/api/datasets") as answer:
        return answer.status
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    inherited = ask(url)
    own = ensure_running()
    os.write(write, json.dumps([inherited, own, ask(own)]).encode())
    os._exit(0)
os.waitpid(pid, 0)
inherited, own, status = json.loads(os.read(read, 1000))
print(json.dumps({"inherited": inherited, "is_new": own != url, "own": status, "parent": ask(url)}))
""",
        subprocess_environment,
    )
    assert found == {"inherited": 200, "is_new": True, "own": 200, "parent": 200}


def test_a_child_that_outlives_its_parent_is_refused_rather_than_left_hanging(subprocess_environment):
    """A child that kept the parent's listening sockets open would wait for an answer that nobody gives."""
    found = run(
        """
import urllib.error, urllib.request
read, write = os.pipe()
if os.fork() == 0:
    parent, url = os.getpid(), ensure_running()
    if os.fork() == 0:
        while os.getppid() == parent:
            time.sleep(0.01)
        try:
            urllib.request.urlopen(url, timeout=10)
        except urllib.error.URLError as error:
            os.write(write, type(error.reason).__name__.encode())
    os._exit(0)
print(json.dumps(os.read(read, 100).decode()))
""",
        subprocess_environment,
    )
    assert found == "ConnectionRefusedError"


def test_threads_that_ask_at_once_get_the_same_hub(subprocess_environment):
    found = run(
        """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(16) as pool:
    urls = set(pool.map(lambda _: ensure_running(), range(64)))
print(json.dumps(len(urls)))
""",
        subprocess_environment,
    )
    assert found == 1
