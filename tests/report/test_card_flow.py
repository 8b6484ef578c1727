"""The card as Metaflow writes it, and as a browser shows it."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metaflow_hf.report import MetricsFile

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """The HTML file of a card of a synthetic run."""
    from importlib import util

    spec = util.spec_from_file_location("synthetic_run", Path(__file__).with_name("conftest.py"))
    synthetic = util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    directory = tmp_path_factory.mktemp("card")
    events = synthetic.make_run(workers=2, rounds=10, positions_left=7)
    with MetricsFile(directory / "metrics.jsonl") as metrics:
        for event in [*events, *synthetic.make_results(events[-1].time)]:
            metrics(event)
    plan = {
        "base_model": "demo/tiny",
        "dataset": "demo/docs",
        "tokens": 1000,
        "model_commit": "0123456789abcdef",
    }
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("METAFLOW_")},
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "METAFLOW_USER": "tester",
        "METAFLOW_HOME": str(directory / "home"),
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(directory / "store"),
        "METAFLOW_CARD_LOCALROOT": str(directory / "cards"),
    }
    flow = Path(__file__).with_name("card_flow.py")
    arguments = ["--metrics", str(directory / "metrics.jsonl"), "--plan-json", json.dumps(plan)]
    run = subprocess.run(
        [sys.executable, str(flow), "--no-pylint", "run", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (html,) = directory.rglob("blank-*.html")
    return html


def test_the_card_holds_charts_and_text_and_fetches_nothing_for_them(card):
    html = card.read_text()
    (data,) = re.findall(r'__MF_DATA__\["[^"]+"\] = "([^"]+)"', html)
    (whole,) = json.loads(base64.b64decode(data))["components"]
    (section,) = whole["contents"]
    kinds = [part["type"] for part in section["contents"]]
    assert kinds.count("vegaChart") == 7
    text = " ".join(part["source"] for part in section["contents"] if part["type"] == "markdown")
    for words in (
        "Training finished: demo/tiny",
        "273x lower",
        "xz -9",
        "TrainFlow/17/merge/5",
        "0123456789ab",
    ):
        assert words in re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), text)
    assert "Serialization Error" not in html
    assert card.stat().st_size < 2_000_000


@pytest.mark.skipif(BROWSER is None, reason="no browser here")
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_draws_every_chart_and_runs_nothing_of_the_samples(card, tmp_path, width):
    shown = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={tmp_path}",
            f"--window-size={width},2000",
            "--virtual-time-budget=8000",
            "--dump-dom",
            card.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    widths = [int(found) for found in re.findall(r'<svg[^>]*class="marks"[^>]*? width="(\d+)"', shown)]
    assert len(widths) == 7
    assert all(0.6 * width < found + 300 and found > 300 for found in widths)
    grey = re.findall(r'<path aria-label="[^"]*position: (\d+)[^"]*"[^>]*fill="#D9D9D9"', shown)
    assert grey == ["160", "161", "162", "163", "164", "165", "166"]
    assert "<title>owned" not in shown
    assert 'src="x"' not in shown
    assert "<strong>bold" not in shown
    assert "&lt;img src=x" in shown
