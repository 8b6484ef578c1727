"""The wheel, installed where the project is not: `metaflow hf init`, then the README's command in what it wrote."""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from stand_ins import stand_in_hub

from metaflow_hf_cli.fixtures import OWNER

from .conftest import ROOT, Shell, make_shell

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Shell:
    """A directory of a user, and an environment that knows the wheel of this project and not its directory."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    kept = ("flows", "configs", "src", "metaflow_extensions")
    for folder in kept:
        shutil.copytree(
            ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", str(source), "--no-deps", "--no-build-isolation", "--wheel-dir", str(root)],
        check=True,
    )
    (wheel,) = root.glob("*.whl")
    shutil.rmtree(source)
    environment = root / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (libraries,) = (environment / "lib").glob("python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(libraries), str(wheel)], check=True)
    # Everything else comes from this environment, whose own way to the project is not followed: it is in a .pth file.
    (libraries / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    shell = make_shell(root)
    return Shell(
        shell.directory, {**shell.environment, "PATH": f"{environment / 'bin'}:{shell.environment['PATH']}"}
    )


def run(shell: Shell, *words: str, **environment: str) -> str:
    done = subprocess.run(
        words,
        cwd=shell.directory,
        env={**shell.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def written(installed: Shell) -> Path:
    output = run(installed, "python", "-m", "metaflow.cmd.main_cli", "hf", "init", "mine")
    assert "cd mine && python flows/train_flow.py run" in output
    return installed.directory / "mine"


def test_init_writes_what_the_project_has(written: Path):
    for folder, ending in (("flows", "py"), ("configs", "yaml")):
        names = {path.name for path in (ROOT / folder).glob(f"*.{ending}")}
        assert {path.name for path in (written / folder).iterdir()} == names
        for name in names:
            assert (written / folder / name).read_bytes() == (ROOT / folder / name).read_bytes()


def test_init_replaces_nothing_that_differs(installed: Shell, written: Path):
    flow = written / "flows" / "hub_flow.py"
    flow.write_text("# mine now\n")
    (written / "configs" / "demo.yaml").unlink()
    again = ("python", "-m", "metaflow.cmd.main_cli", "hf", "init", "mine")
    status, output = Shell(installed.directory, installed.environment).run(*again[1:])
    assert status == 1
    assert "other files of these names: flows/hub_flow.py. Nothing was written." in output
    assert not (written / "configs" / "demo.yaml").exists()
    run(installed, *again, "--force")
    assert flow.read_bytes() == (ROOT / "flows" / "hub_flow.py").read_bytes()


def test_fine_tuning_as_the_readme_says(installed: Shell, written: Path, start_hub, readme):
    """The command as it stands, with a hub on localhost where the real one would be; its last step publishes the model."""
    content = stand_in_hub(330)
    content.add_user(OWNER, "owner", namespaces=("acme",))
    server = start_hub(content)
    command = readme.commands[3]
    assert "configs/finetune_full.yaml" in command
    shell = Shell(written, installed.environment)
    where = run(shell, "python", "-c", "import metaflow_hf; print(metaflow_hf.__file__)")
    assert str(ROOT) not in where
    with (written / "configs" / "finetune_full.yaml").open("a") as config:
        config.write("\npublish:\n  repo_id: acme/stories\n")
    output = run(shell, *command, HF_ENDPOINT=server.url, HF_TOKEN=OWNER)
    assert "gpt2 @ " in output
    assert "hf://roneneldan/TinyStories @ " in output
    loss = [float(re.search(rf"│ +{row} training +([\d.]+)", output)[1]) for row in ("before", "after")]
    assert loss[1] < loss[0]

    commit = content.repo("acme/stories").resolve()
    assert re.search(rf"pushed \d+ files, .* to {server.url}/acme/stories/commit/{commit.sha}", output)
    assert OWNER not in output
    assert not [
        path
        for path in installed.directory.rglob("*")
        if path.is_file() and OWNER.encode() in path.read_bytes()
    ]
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = (kind.from_pretrained('acme/stories') for kind in (AutoModelForCausalLM, AutoTokenizer))\n"
        "print(len(tokenizer.decode(model.generate(**tokenizer('once', return_tensors='pt'), max_new_tokens=3)[0])))\n"
    )
    assert int(run(shell, "python", "-c", code, HF_ENDPOINT=server.url).split()[-1]) > len("once")
    card = commit.files["README.md"].data.decode()
    assert f"| loss | `hf://roneneldan/TinyStories` | {loss[0]:.4g} | **{loss[1]:.4g}** |" in card
