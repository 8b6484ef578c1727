"""Everything that a task needs goes with it, however this project was installed: as it is worked on, from a wheel, or
by a path.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from schedulers.images import Image
from schedulers.pods import require_namespaces

from metaflow_extensions.hf.requirements import (
    REQUIREMENTS,
    MissingPackage,
    add_requirements,
    requirements_of,
)

from .conftest import FLOWS, PLAIN, ROOT

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(900)]
OURS = ("metaflow_hf/", "metaflow_hf_cli/", "metaflow_extensions/")


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A clean copy of what is tracked: nothing that lies about gets in."""
    directory = tmp_path_factory.mktemp("source")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listing.decode().split("\0")):
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target, follow_symlinks=False)
    return directory


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory) -> Path:
    building = tmp_path_factory.mktemp("building")
    shutil.copytree(source, building / "source", symlinks=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(building),
        ".",
    ]
    subprocess.run(command, cwd=building / "source", check=True, capture_output=True)
    [built] = building.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed_wheel(wheel: Path, tmp_path_factory) -> Path:
    """The Python of a fresh environment, outside the checkout, into which the wheel was installed."""
    root = tmp_path_factory.mktemp("fresh") / "venv"
    image = Image.build(
        root, ["metaflow-hf", "metaflow", "kubernetes"], packages=Image.packages(), without={"metaflow-hf"}
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "-q",
        "--python",
        str(image.root / "bin/python"),
        "install",
        "--no-deps",
    ]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return image.root / "bin/python"


def package_of(python: str, directory: Path, **environment: str) -> dict[str, bytes]:
    """What Metaflow packages for remote tasks, by path; of ours as they are imported."""
    path = directory / "package.tgz"
    done = subprocess.run(
        [python, str(FLOWS / "hub_flow.py"), "package", "save", str(path)],
        cwd=directory,
        env={"PATH": "/usr/bin:/bin", "HOME": str(directory), "METAFLOW_USER": "tester", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(path) as archive:
        return {
            member.name.removeprefix(".mf_code/"): archive.extractfile(member).read()
            for member in archive
            if member.isfile()
        }


def of_ours(packaged: dict[str, bytes]) -> dict[str, bytes]:
    # Metaflow puts an empty __init__.py into the namespace package.
    own = {"metaflow_extensions/__init__.py"}
    return {path: content for path, content in packaged.items() if path.startswith(OURS) and path not in own}


def tracked() -> dict[str, bytes]:
    """The files that a task may need, as they are in the repository, by import path: the commands stay at home."""
    listing = subprocess.run(
        ["git", "ls-files", "src/metaflow_hf", "metaflow_extensions"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return {path.removeprefix("src/"): (ROOT / path).read_bytes() for path in listing}


def test_the_package_holds_all_that_tasks_need_and_nothing_else(tmp_path: Path):
    packaged = package_of(sys.executable, tmp_path)
    ours = of_ours(packaged)
    assert ours == tracked()
    assert not [
        path for path in packaged if re.search(r"(^|/)(tests|\.git|\.venv|[^/]*cache[^/]*)/|\.pyc$", path)
    ]
    # Of which Metaflow itself is 1.6 MB. It is downloaded once by each task.
    size = (tmp_path / "package.tgz").stat().st_size
    assert size < 2.25 * 2**20, size


def test_the_commands_say_why_a_task_does_not_have_them(tmp_path: Path):
    package_of(sys.executable, tmp_path)
    with tarfile.open(tmp_path / "package.tgz") as archive:
        archive.extractall(tmp_path / "task", filter="data")
    python = Image.build(tmp_path / "image", packages=Image.packages()).root / "bin/python"
    # As Metaflow sets it in a task.
    task = {"METAFLOW_EXTRACTED_ROOT": str(tmp_path / "task"), "PYTHONPATH": str(tmp_path / "task/.mf_code")}

    def metaflow(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), "-m", "metaflow.cmd.main_cli", *words],
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **task},
            capture_output=True,
            text=True,
            check=False,
        )

    refused = metaflow("hf", "gc", "--keep-days", "9")
    assert refused.returncode == 1
    assert re.fullmatch(
        r"Error: `metaflow hf gc`: the commands of metaflow-hf do not travel with the code of a task\. Call them where "
        r"metaflow-hf is installed, or install it in the image of the task: pip install metaflow-hf==\S+\n",
        refused.stderr,
    )
    assert metaflow("status").returncode == 0, "other commands of Metaflow work"


def test_the_package_is_the_same_from_a_wheel_and_from_a_path(
    installed_wheel: Path, source: Path, tmp_path: Path
):
    wanted = tracked()
    (tmp_path / "wheel").mkdir()
    from_wheel = package_of(str(installed_wheel), tmp_path / "wheel")
    assert of_ours(from_wheel) == wanted
    (tmp_path / "path").mkdir()
    require_namespaces()
    without = Image.build(
        tmp_path / "venv", ["metaflow-hf", "metaflow"], packages=Image.packages(), without={"metaflow-hf"}
    )
    path = f"{source / 'src'}:{source}"
    by_path = package_of(str(without.root / "bin/python"), tmp_path / "path", PYTHONPATH=path)
    assert of_ours(by_path) == wanted


def test_a_flow_that_is_deployed_from_the_wheel_runs(deployments, image, installed_wheel: Path):
    deployed = deployments(image)
    deployed.environment.pop("PYTHONPATH", None)
    flow = FLOWS / "hub_flow.py"
    deployed.succeed(flow, "argo-workflows", "create", python=str(installed_wheel))
    deployed.succeed(flow, "argo-workflows", "trigger", python=str(installed_wheel))
    workflow = deployed.argo_workflow("hubflow")
    workflow.run()
    assert "metaflow-hf/tiny-llama at commit" in workflow.pods[-1].printed()


def test_in_an_image_without_our_requirements_other_flows_run_and_ours_say_what_to_do(
    deployments, bare_image
):
    deployed = deployments(bare_image)
    deployed.succeed(PLAIN, "argo-workflows", "create")
    deployed.succeed(PLAIN, "argo-workflows", "trigger", "--word", 'it\'s; (fine) & "safe"')
    workflow = deployed.argo_workflow("plainflow")
    workflow.run()
    printed = {pod.root.name: pod.printed() for pod in workflow.pods}
    assert "squares [0, 1] ['a', 'b']" in printed["join-0-0"]
    assert "word 'it\\'s; (fine) & \"safe\"'" in printed["end-0-0"]

    deployed.succeed(FLOWS / "hub_flow.py", "argo-workflows", "create")
    deployed.succeed(FLOWS / "hub_flow.py", "argo-workflows", "trigger")
    with pytest.raises(
        Exception, match="@huggingface_hub needs .*, which is not installed where this task runs"
    ):
        deployed.argo_workflow("hubflow").run()


def test_requirements_are_those_of_the_project_and_come_with_pypi():
    declared = {
        requirement.name: str(requirement.specifier)
        for requirement in map(Requirement, importlib.metadata.requires("metaflow-hf"))
    }
    assert REQUIREMENTS.items() <= declared.items()

    class Decorator:
        def __init__(self, name: str, packages: dict[str, str] | None) -> None:
            self.name, self.attributes = name, {"packages": packages}

    chosen = Decorator("pypi", {"Huggingface-Hub": "2.0", "torch": "2.9"})
    other = Decorator("resources", None)
    add_requirements([chosen, other, conda := Decorator("conda", None)])
    assert (
        chosen.attributes["packages"].items()
        >= {"Huggingface-Hub": "2.0", "torch": "2.9", "obstore": ">=0.8"}.items()
    )
    assert "huggingface_hub" not in chosen.attributes["packages"]
    assert (other.attributes["packages"], conda.attributes["packages"]) == (None, REQUIREMENTS)

    with (
        pytest.raises(MissingPackage, match=r"@model needs huggingface_hub>=1.0, which is too old"),
        requirements_of("model"),
    ):
        from huggingface_hub import what_will_never_be  # noqa: F401
    with pytest.raises(ModuleNotFoundError), requirements_of("model"):
        import what_nobody_needs  # noqa: F401
