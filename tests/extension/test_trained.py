"""Models of other runs by the names that people know."""

import re
import subprocess
import sys
from pathlib import Path

FLOW = Path(__file__).parent / "flows" / "saved_flow.py"
FIND = """
import sys
from metaflow import get_namespace
from metaflow_extensions.hf.trained import find_model
from metaflow_hf.errors import MetaflowHFError
for name in sys.argv[1:]:
    before = get_namespace()
    try:
        print(name, "->", find_model(name)["key"])
    except MetaflowHFError as error:
        print(name, "->", error)
    assert get_namespace() == before
"""


def test_a_model_is_found_by_flow_run_and_key(subprocess_environment, tmp_path: Path):
    def run(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env=subprocess_environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    output = run(FLOW, "run")
    key, run_id = re.search(r"key (models/\S+)", output)[1], re.search(r"run-id (\d+)", output)[1]
    found = run(
        "-c",
        FIND,
        "SavedFlow",
        f"SavedFlow/{run_id}",
        key,
        "SavedFlow/1",
        "NoFlow",
        "models/SavedFlow/x.json",
    )
    lines = dict(line.split(" -> ", 1) for line in found.splitlines() if " -> " in line)
    assert lines["SavedFlow"] == lines[f"SavedFlow/{run_id}"] == lines[key] == key
    for name in ("SavedFlow/1", "NoFlow"):
        assert f"{name!r} has no trained model: give a run that ended well" in lines[name]
    assert "nothing is stored under" in lines["models/SavedFlow/x.json"]


def test_no_model_to_compare_is_said(run_flow):
    done = run_flow(Path(__file__).parents[2] / "flows/evaluate_flow.py", "--models", ",")
    assert done.status != 0
    assert done.lines("names no model: give a run, a flow or a key.")
    assert not done.lines("StopIteration")
