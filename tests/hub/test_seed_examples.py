"""How people download models, as tutorials show it: each block works with this package's functions in place of
huggingface_hub's, and where it writes a function of its own there is one here that does it.
"""

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from metaflow_hf.hub import (
    download_large_model,
    download_many,
    hf_hub_download,
    production_download,
    scan_cache,
    snapshot_download,
)
from metaflow_hf.store import datastore


@pytest.fixture(autouse=True)
def project(hub, tmp_path: Path, monkeypatch) -> Path:
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setattr(datastore, "_active", ("local", str(tmp_path / ".metaflow")))
    return directory


def names(directory) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in Path(directory).rglob("*") if path.is_file()}


def test_entire_model(project: Path):
    model_path = snapshot_download(
        repo_id="bert-base-uncased",
        cache_dir="/custom/cache/path",
        local_dir="./local_model",
        local_dir_use_symlinks=False,
    )
    assert Path(model_path) == Path("local_model")
    assert {"config.json", "model.safetensors", "vocab.txt"} <= names("local_model")
    assert not any(path.is_symlink() for path in Path("local_model").rglob("*"))


def test_specific_files():
    config_path = hf_hub_download(
        repo_id="bert-base-uncased", filename="config.json", cache_dir="/custom/cache/path"
    )
    assert json.loads(Path(config_path).read_text())["model_type"] == "bert"
    model_path = hf_hub_download(
        repo_id="facebook/opt-350m", filename="pytorch_model.bin", subfolder="", cache_dir=None
    )
    assert Path(model_path).stat().st_size > 1000


def test_patterns():
    model_path = snapshot_download(
        repo_id="microsoft/phi-2",
        allow_patterns=["*.json", "*.model", "*.txt"],
        ignore_patterns=["*.bin", "*.h5"],
    )
    assert names(model_path)
    assert {name.rpartition(".")[2] for name in names(model_path)} <= {"json", "model", "txt"}
    shard = snapshot_download(
        repo_id="meta-llama/Llama-2-7b-hf", allow_patterns=["*00001-of-*", "*.json", "tokenizer*"]
    )
    assert [name for name in names(shard) if "-of-" in name] == ["model-00001-of-00002.safetensors"]


def test_versions(hub):
    commit = hub.content.repo("gpt2").resolve("v1.0").sha
    for revision, readme in (("main", "Revised."), ("v1.0", None), (commit[:7], None)):
        model_path = snapshot_download(repo_id="gpt2", revision=revision)
        assert ("Revised." in Path(model_path, "README.md").read_text()) is (readme is not None)
    pr_model = snapshot_download(repo_id="bigcode/starcoder", revision="refs/pr/42")
    assert "Proposed." in Path(pr_model, "README.md").read_text()


def test_understanding_the_cache():
    snapshot_download("gpt2")
    snapshot_download("bert-base-uncased", allow_patterns="*.json")
    cache_info = scan_cache()
    print(f"Total cache size: {cache_info.size_on_disk_str}")
    print(f"Number of repos: {len(cache_info.repos)}")
    for repo in cache_info.repos:
        print(f"- {repo.repo_id}: {repo.size_on_disk_str}")
    assert {repo.repo_id for repo in cache_info.repos} == {"gpt2", "bert-base-uncased"}
    assert cache_info.size_on_disk == sum(repo.size_on_disk for repo in cache_info.repos)


def test_cache_control(hub, monkeypatch):
    snapshot_download(repo_id="gpt2")
    with hub.log.new() as log:
        snapshot_download(repo_id="gpt2", force_download=True)
    assert log.file_bytes() > 1000
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with hub.log.new() as log:
        assert snapshot_download("gpt2")
        with pytest.raises(Exception, match="Run once online"):
            snapshot_download("bert-base-uncased")
    assert len(log) == 0


def test_stages():
    path = download_large_model("meta-llama/Llama-2-13b-hf")
    assert len([name for name in names(path) if "-of-" in name]) == 4


INTERRUPTED = """
import signal, sys
from metaflow_hf.hub import snapshot_download

def signal_handler(sig, frame):
    print('\\nDownload interrupted! Run again to resume.')
    sys.exit(0)

signal.signal(signal.SIGINT, signal_handler)

model_path = snapshot_download(
    repo_id="meta-llama/Llama-2-70b-hf",
    local_dir="./llama-70b",
    max_workers=1,
)
"""


def test_resume(hub, subprocess_environment, project: Path):
    import subprocess

    gate = hub.faults.hold_next(1, path="*00004-of-*", method="GET")
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], env=subprocess_environment, stdout=subprocess.PIPE, text=True
    )
    assert gate.wait_until_held()
    process.send_signal(signal.SIGINT)
    gate.open()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    assert "Run again to resume." in output
    with hub.log.new() as log:
        done = subprocess.run([sys.executable, "-c", INTERRUPTED], env=subprocess_environment, check=False)
    assert done.returncode == 0
    assert len([name for name in names("llama-70b") if "-of-" in name]) == 6
    assert not log.file_bytes(path="*00001-of-*")
    assert log.file_bytes(path="*00006-of-*")


def test_transformers():
    from transformers import AutoModel, AutoTokenizer

    for source in ("bert-base-uncased", snapshot_download("bert-base-uncased")):
        model = AutoModel.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        assert model(**tokenizer("hello world", return_tensors="pt")).last_hidden_state.shape[0] == 1


def test_custom_progress():
    from huggingface_hub import HfApi

    info = HfApi().model_info("bert-base-uncased")
    path = snapshot_download(repo_id="bert-base-uncased", local_dir=None, tqdm_class=None)
    assert names(path) == {sibling.rfilename for sibling in info.siblings}


def test_batches():
    def download_single(model_id):
        try:
            return model_id, {"status": "success", "path": snapshot_download(model_id)}
        except Exception as e:
            return model_id, {"status": "error", "error": str(e)}

    models_to_download = ["bert-base-uncased", "gpt2", "distilbert-base-uncased"]
    with ThreadPoolExecutor(max_workers=3) as executor:
        futures = [executor.submit(download_single, model) for model in models_to_download]
        results = dict(future.result() for future in futures)
    assert json.loads(json.dumps(results)) == download_many(models_to_download)
    assert {result["status"] for result in results.values()} == {"success"}


def test_errors():
    from huggingface_hub.utils import RepositoryNotFoundError, RevisionNotFoundError

    def safe_download(repo_id, **kwargs):
        try:
            return snapshot_download(repo_id, **kwargs)
        except RepositoryNotFoundError:
            return f"Repository {repo_id} not found!"
        except RevisionNotFoundError:
            return f"Revision not found for {repo_id}"

    assert safe_download("no/such") == "Repository no/such not found!"
    assert safe_download("gpt2", revision="v9") == "Revision not found for gpt2"
    assert os.path.isdir(safe_download("gpt2"))


def test_production(project: Path):
    prod_dir = production_download(
        "facebook/opt-350m", "models/facebook/opt-350m", required_files=["config.json", "pytorch_model.bin"]
    )
    assert {"config.json", "pytorch_model.bin"} <= names(prod_dir)


def test_monitoring(capsys):
    start_time = time.time()
    print(f"[{datetime.now()}] Starting download of gpt2")
    path = snapshot_download("gpt2")
    print(f"[{datetime.now()}] Completed in {time.time() - start_time:.2f}s")
    print(f"Downloaded to: {path}")
    assert "Downloaded to: /" in capsys.readouterr().out
