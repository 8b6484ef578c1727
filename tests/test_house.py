"""Rules of the house that no linter knows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_the_package_costs_the_standard_library_only():
    foreign = modules_after("import metaflow_hf") - set(sys.stdlib_module_names) - {"metaflow_hf"}
    # What the interpreter itself loads at start (site-packages' .pth files) is not ours.
    foreign -= modules_after("pass")
    assert foreign == set()


@pytest.mark.parametrize("part", ["hub", "data", "rollout", "train", "store", "report"])
def test_importing_a_part_does_not_load_the_heavy_ones(part: str):
    heavy = {"torch", "transformers", "datasets", "pyarrow", "pandas", "peft"}
    assert not heavy & modules_after(f"import metaflow_hf.{part}")


@pytest.mark.parametrize("flow", sorted(path.name for path in (ROOT / "flows").glob("*.py")))
def test_a_flow_can_still_choose_its_hub(flow: str):
    # Both read their endpoint once, at import.
    statement = f"import runpy; runpy.run_path('flows/{flow}', run_name='flow')"
    assert not {"huggingface_hub", "datasets"} & modules_after(statement)


def test_importing_metaflow_with_the_extension_stays_light():
    heavy = {
        "torch",
        "transformers",
        "datasets",
        "pyarrow",
        "huggingface_hub",
        "pydantic",
        "obstore",
        "numpy",
    }
    assert not heavy & modules_after("import metaflow")


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("metaflow", "huggingface_hub model checkpoint Checkpoint load_model delete_model"),
        ("metaflow_hf", "SnapshotRef ModelRef CheckpointRef __version__ MetaflowHFError"),
        (
            "metaflow_hf.hub",
            "snapshot_download hf_hub_download download_many download_large_model production_download scan_cache "
            "search_datasets push",
        ),
        (
            "metaflow_hf.data",
            "StreamingBlockWriter build_blocks process_raw_dataset_to_blocks BlockManager Block Chunk ChunkTracker "
            "Claim chunk_order verify_blocks",
        ),
        ("metaflow_hf.rollout", "chunked_segment_rollout probe_model RolloutReport"),
        ("metaflow_hf.train", "train_worker RoundsLedger export_lineage evaluate generate"),
    ],
)
def test_public_names_are_where_they_are_said_to_be(part: str, names: str):
    import importlib

    module = importlib.import_module(part)
    for name in names.split():
        assert getattr(module, name) is not None
        if part != "metaflow":
            assert name in module.__all__


def test_only_one_module_reads_the_environment():
    readers = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "src/metaflow_hf").rglob("*.py")
        if re.search(r"os\.environ(\.get\(|\[[^\]]*\](?! *=))|os\.getenv", path.read_text())
    }
    assert readers == {"src/metaflow_hf/environment.py"}


def test_the_library_never_prints():
    for path in (ROOT / "src").rglob("*.py"):
        assert not re.search(r"^\s*print\(", path.read_text(), re.MULTILINE), path


def test_nothing_of_ours_unpickles():
    # What users' weights may be loaded with is transformers', behind `allow_pickle`.
    ways = re.compile(
        r"pickle\.loads?\b|\bUnpickler\b|torch\.load\(|joblib|\bdill\b|\bmarshal\b|\bshelve\b|\b(?:np|numpy)\.load\b"
        r"|allow_pickle=True|weights_only=False"
    )
    sources = [
        path for part in ("src", "metaflow_extensions", "flows") for path in (ROOT / part).rglob("*.py")
    ]
    assert len(sources) > 100
    assert {
        str(path.relative_to(ROOT)): found for path in sources if (found := ways.findall(path.read_text()))
    } == {}
