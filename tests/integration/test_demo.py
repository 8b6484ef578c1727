"""`make demo`, as the README promises it, and what can be done with its model."""

import base64
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import ROOT, Shell, make_shell

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]
TRAIN = ROOT / "flows" / "train_flow.py"


@dataclass(frozen=True)
class Demo:
    shell: Shell
    output: str

    @property
    def run_id(self) -> str:
        return re.search(r"run-id (\d+)", self.output)[1]

    @property
    def store(self) -> Path:
        return self.shell.directory / ".metaflow" / "mf.hf"

    @property
    def reference(self) -> dict:
        lines = [line.partition("│ ")[2] for line in self.output.splitlines()]
        text = "\n".join(lines)
        return json.loads(text[text.index("{") : text.rindex("}") + 1])

    def figure(self, row: str) -> list[float]:
        line = re.search(rf"│ +{row} +(.*)", self.output)[1]
        return [float(number.replace(",", "")) for number in line.split()]


@pytest.fixture(scope="session")
def demo(tmp_path_factory, readme) -> Demo:
    """The README's first command, run once."""
    shell = make_shell(tmp_path_factory.mktemp("demo"))
    assert readme.commands[0] == ["make", "demo"]
    done = subprocess.run(
        readme.commands[0],
        cwd=ROOT,
        # Nobody says who runs it, as in a container.
        env={name: value for name, value in shell.environment.items() if name != "METAFLOW_USER"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1100,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return Demo(shell, done.stdout)


def test_it_says_what_it_will_do_before_it_does_it(demo: Demo):
    plan, first_step = demo.output.index("│ Plan"), demo.output.index(" step 1 (")
    assert plan < first_step
    for said in (
        "metaflow-hf/tiny-llama @ ",
        "hf://metaflow-hf/python-docs @ ",
        "1,269",
        "tokens",
        "rounds",
        "workers",
    ):
        assert said in demo.output[plan:first_step]
    assert re.search(
        r"\[worker [01] \S+\] round \d+ step \d+ \(\d+%\) loss [\d.]+ lr \S+ \S+ tok/s eta ", demo.output
    )


def test_the_model_learned(demo: Demo):
    _, before, _ = demo.figure("before training")
    _, after, after_bits = demo.figure("after training")
    _, unigram, unigram_bits = demo.figure("unigram model")
    assert 1_900 < before < 2_200  # untrained: no better than guessing among 2,048 tokens
    assert before > 10 * after
    assert after < unigram
    assert after_bits < unigram_bits
    assert 1 < demo.figure("xz -9")[0] < 3
    assert demo.output.count("prompt:") == 2


def test_every_position_is_in_the_model_exactly_once(demo: Demo, check_lineage):
    rounds = check_lineage(demo.store / "training" / f"TrainFlow-{demo.run_id}")
    assert len(rounds) > 40
    contributors = {accepted["attempt"] for manifest in rounds for accepted in manifest["accepted"]}
    assert len(contributors) == 2


def test_the_card_is_where_it_says(demo: Demo):
    path = Path(re.search(r"│ +card +(\S+)", demo.output)[1])
    assert demo.run_id in path.parts
    assert "evaluate" in path.parts
    html = path.read_text("utf-8")
    assert html.lstrip().lower().startswith("<!doctype html>")
    encoded = re.search(r'__MF_DATA__\["[^"]+"\] = "([^"]+)"', html)[1]
    text = base64.b64decode(encoded).decode()
    assert "held-out perplexity" in text
    assert demo.reference["key"] in text
    assert text.count("vega-lite") >= 3  # loss, rounds, throughput


def test_the_reference_loads_anywhere(demo: Demo):
    reference = demo.reference
    code = (
        "import sys; from metaflow import load_model\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"load_model({reference['key']!r}, 'mine')\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained('mine'), AutoTokenizer.from_pretrained('mine')\n"
        "print(model.num_parameters(), tokenizer.decode(tokenizer('a text')['input_ids']))\n"
    )
    elsewhere = Shell(demo.shell.directory.parent / "elsewhere", demo.shell.environment)
    elsewhere.directory.mkdir()
    assert "1049728 a text" in elsewhere.succeed("-c", code)
    files = {path.name for path in (elsewhere.directory / "mine").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    assert sum(path.stat().st_size for path in (elsewhere.directory / "mine").iterdir()) == reference["size"]


def test_another_flow_generates_with_it(demo: Demo, readme):
    command = readme.commands[-1]
    assert command[:2] == ["python", "flows/generate_flow.py"]
    text = demo.shell.directory / "text.txt"
    text.write_text("Return the name of the file. If the argument is None, raise an error.")
    output = demo.shell.succeed(ROOT / command[1], *command[2:], "--text", text)
    assert f"Using the model of TrainFlow/{demo.run_id}" in output
    assert output.count("│ Once upon a time") == 3
    perplexity = float(re.search(r"perplexity ([\d.]+) on \d+ tokens", output)[1])
    assert 1 < perplexity < 1_000


def test_another_flow_compares_models_side_by_side(demo: Demo):
    run = f"TrainFlow/{demo.run_id}"
    output = demo.shell.succeed(
        ROOT / "flows/evaluate_flow.py", "run", "--models", f"{run},{demo.reference['key']}", timeout=200
    )
    rows = [line.partition("│ ")[2].split() for line in output.splitlines() if "│   " in line]
    figures = {row[0]: row[1:] for row in rows[1:]}
    # One model by two names, measured on what its own training held out.
    assert figures[run] == figures[demo.reference["key"]]
    assert float(figures[run][1]) == pytest.approx(demo.figure("after training")[0], abs=0.002)


def test_the_notebook_runs_and_shows_what_it_promises(demo: Demo):
    notebook = json.loads((ROOT / "docs/from_run_to_model.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    elsewhere = Shell(demo.shell.directory.parent / "notebook", demo.shell.environment)
    elsewhere.directory.mkdir()
    # As a kernel does it: one namespace, the value of a cell's last expression is shown.
    code = (
        "import ast, sys\n"
        f"cells = {cells!r}\n"
        "space = {'__name__': '__main__'}\n"
        "for cell in cells:\n"
        "    tree = ast.parse(cell)\n"
        "    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None\n"
        "    exec(compile(tree, 'cell', 'exec'), space)\n"
        "    if last is not None:\n"
        "        print(eval(compile(ast.Expression(last.value), 'cell', 'eval'), space))\n"
    )
    output = elsewhere.succeed("-c", code, timeout=200)
    assert f"TrainFlow/{demo.run_id}" in output
    assert demo.reference["key"] in output
    assert "after training" in output
    assert "metaflow-hf/tiny-llama" in output


def test_the_commands_of_results_md_show_what_is_pushed_and_where_it_is_from(demo: Demo):
    [block] = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/results.md").read_text(), re.DOTALL)
    output = ""
    for line in block.splitlines():
        words = line.replace("TrainFlow/17", f"TrainFlow/{demo.run_id}").split()
        assert words[0] == "metaflow"
        output += demo.shell.succeed("-m", "metaflow.cmd.main_cli", *words[1:])
    assert "base_model: metaflow-hf/tiny-llama" in output
    assert "model.safetensors" in output
    assert "metaflow-hf/tiny-llama @ " in output
    assert "hf://metaflow-hf/python-docs @ " in output
    assert re.search(r"rounds +\d+, \d+ contributions of 2 workers", output)


def test_the_second_run_downloads_nothing(demo: Demo, check_lineage):
    assert "Downloaded metaflow-hf/tiny-llama" in demo.output
    blobs = sorted((demo.store / "datasets").rglob("*.jsonl"))
    times = [path.stat().st_mtime_ns for path in blobs]
    assert times
    output = demo.shell.succeed(TRAIN, "run", "--max_tokens", "1000", timeout=600)
    assert "Downloaded" not in output
    assert [path.stat().st_mtime_ns for path in sorted((demo.store / "datasets").rglob("*.jsonl"))] == times
    run_id = re.search(r"run-id (\d+)", output)[1]
    check_lineage(demo.store / "training" / f"TrainFlow-{run_id}")
