"""The images and services, without a container engine: linted, then every command of theirs, one by one.

By default what is installed here stands for the packages that the image would download, and trainings only say what they
would do. ``make images`` leaves nothing out.
"""

import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from containers.dockerfile import Build, Image, copy_context
from containers.filesystem import mounting_is_permitted
from containers.services import run_service, services

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = (ROOT / "compose.yaml").read_text()
WHOLE = bool(os.environ.get("WHOLE_IMAGES"))
MODEL = "bert-base-uncased"
TOKEN = "hf_owner"

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(3600 if WHOLE else 400)]


def test_the_dockerfile_has_no_known_mistake():
    hadolint = Path(sysconfig.get_path("scripts"), "hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_services_are_what_the_compose_specification_allows():
    found = services(COMPOSE, {})
    assert set(found) == {"demo", "demo-gpu", "downloader", "ml-service", "s3", "train-s3"}
    # The demo alone needs nothing but `docker compose up`.
    assert [name for name, service in found.items() if not service.get("profiles")] == ["demo"]
    declared = set(yaml.safe_load(COMPOSE)["volumes"])
    used = {str(volume).partition(":")[0] for service in found.values() for volume in service["volumes"]}
    assert used == declared
    with pytest.raises(ValueError, match="commandd"):
        services(COMPOSE.replace("command: hf", "commandd: hf"), {})


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("context") / "files"
    copy_context(ROOT, place, (ROOT / ".dockerignore").read_text())
    return place


def test_nothing_but_what_the_image_needs_is_sent_to_the_builder(context: Path):
    named = {"constraints.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert {path.name for path in context.iterdir()} == named | {
        "src",
        "metaflow_extensions",
        "flows",
        "configs",
    }
    assert not [path for path in context.rglob("*") if path.name in ("__pycache__", ".metaflow")]
    assert sum(path.stat().st_size for path in context.rglob("*") if path.is_file()) < 5_000_000


@pytest.fixture(scope="module")
def built(hub_server, context: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    place = tmp_path_factory.mktemp("image")
    if not mounting_is_permitted(place):
        pytest.skip("mounting a file system is not permitted here")

    def after(image: Image, command: str) -> None:
        if command.startswith("python -m venv") and not WHOLE:
            # What is installed here is installed there.
            there = sysconfig.get_path("purelib", vars={"base": "/opt/venv", "platbase": "/opt/venv"})
            image.root.of(there, "packages.pth").write_text("/opt/packages\n")
            for name in ("hf", "metaflow"):
                script = Path(sysconfig.get_path("scripts"), name).read_text()
                place = image.root.of("/opt/venv/bin", name)
                place.write_text("#!/opt/venv/bin/python\n" + script.partition("\n")[2])
                place.chmod(0o755)

    here = {} if WHOLE else {"DEBIAN_PACKAGES": ""}
    # pip reads "no" as that there is to be no isolation.
    quick = {} if WHOLE else {"PIP_NO_BUILD_ISOLATION": "no"}
    build = Build(
        place,
        context,
        arguments={"MODELS": f"{MODEL} acme/private-model", "HF_ENDPOINT": hub_server.url, **here},
        environment={
            name: value
            for name, value in os.environ.items()
            if name.startswith("PIP_") and name != "PIP_USER"
        }
        | quick
        | {"HF_HUB_DISABLE_XET": "1", "PIP_RETRIES": "1", "NO_PROXY": "127.0.0.1"},
        secrets={"HF_TOKEN": TOKEN},
        hide=[ROOT.parent],
        share={} if WHOLE else {"/opt/packages": Path(sysconfig.get_path("purelib"))},
        after=after,
    )
    try:
        build.run((ROOT / "Dockerfile").read_text())
        yield build
    finally:
        build.close()


@pytest.fixture(scope="module")
def image(built: Build) -> Image:
    return built.images["image"]


@pytest.fixture
def outside(hub_server) -> dict[str, str]:
    """What a container needs to reach this machine's hub."""
    return {"HF_ENDPOINT": hub_server.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}


def python(image: Image, code: str, **environment: str) -> str:
    return image.root.run(
        ["python", "-c", code], {**image.environment, **environment}, directory="/workspace", user=image.user
    ).strip()


def test_the_image_has_the_package_the_flows_and_the_models_and_runs_as_nobody(image: Image, built: Build):
    assert image.user == "1000"
    assert image.command == ["python", "flows/train_flow.py", "run"]
    # The commands as well, which code packages leave out.
    for package in ("metaflow_hf", "metaflow_hf_cli"):
        assert python(image, f"import {package}; print({package}.__file__)").startswith("/opt/venv/lib/")
    assert python(image, "import os; print(os.getuid(), os.access('/opt/venv', os.W_OK))") == "1000 False"
    assert not image.root.of(ROOT).exists() or not list(image.root.of(ROOT).iterdir())
    code = (
        "from huggingface_hub import snapshot_download as get; import os; "
        f"print(sorted(os.listdir(get({MODEL!r}))), os.listdir(get('acme/private-model')))"
    )
    found = python(image, code, HF_HUB_OFFLINE="1")
    assert "'model.safetensors'" in found
    assert "config.json" in found.partition("] [")[2]
    # Neither in the image nor in what the build said.
    assert TOKEN not in built.output
    assert not _files_with(image, TOKEN)


def _files_with(image: Image, word: str) -> list[str]:
    places = [image.root.of(name) for name in ("/models", "/workspace", "/home/metaflow", "/opt/venv/bin")]
    done = subprocess.run(["grep", "-rl", word, *places], capture_output=True, text=True, check=False)
    return done.stdout.split()


def test_constraints_hold_for_every_package_of_the_image(image: Image):
    code = "from importlib.metadata import distributions as d; print(*{f'{x.name}=={x.version}'.lower() for x in d()})"
    installed = {
        name.replace("_", "-"): version.partition("+")[0]
        for name, _, version in (word.partition("==") for word in python(image, code).split())
    }
    pinned = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    wrong = {name: (version, pinned[name]) for name, version in installed.items() if name in pinned}
    assert {name: pair for name, pair in wrong.items() if pair[0] != pair[1]} == {}
    assert len(wrong) > 50


def test_a_model_is_downloaded_once_for_all_containers(image: Image, hub, outside, tmp_path: Path):
    found = services(COMPOSE, {"HF_ENDPOINT": hub.url, "MODEL": "gpt2"})
    assert found["ml-service"]["depends_on"] == {
        "downloader": {"condition": "service_completed_successfully"}
    }
    with hub.log.new() as log:
        run_service(found["downloader"], image, tmp_path / "1", tmp_path / "volumes", environment=outside)
    assert log.count(path="*/model.safetensors", method="GET") >= 1
    with hub.log.new() as log:
        said = run_service(
            found["ml-service"], image, tmp_path / "2", tmp_path / "volumes", environment=outside
        )
    assert "model.safetensors" in said
    assert len(log) == 0
    assert list((tmp_path / "volumes" / "datastore" / ".metaflow" / "mf.hf" / "manifests").rglob("*.json"))


@pytest.mark.parametrize("name", ["demo", "train-s3"])
def test_trainings_run_in_their_containers(image: Image, name: str, s3_server, tmp_path: Path):
    bucket = s3_server.new_bucket().partition("://")[2].partition("/")[0]
    text = COMPOSE.replace("s3://metaflow/", f"s3://{bucket}/")
    service = services(text, {"S3_ENDPOINT": s3_server.url, "S3_KEY": "key", "S3_SECRET": "secret"})[name]
    if not WHOLE:
        assert service["command"].endswith(" run")
        service = {**service, "command": service["command"].removesuffix("run") + "show"}
    said = run_service(service, image, tmp_path / "1", tmp_path / "volumes", timeout=3000)
    assert "after training" in said if WHOLE else "Stream the dataset into blocks" in said
    if WHOLE and name == "demo":
        assert list((tmp_path / "volumes" / "datastore" / ".metaflow" / "mf.hf" / "training").rglob("*.json"))
