"""Commits carry git's own hashes, so they are the same everywhere and can be checked by anyone."""

import os
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaflow_hf.demo.commits import HubFile
from metaflow_hf.demo.content import HubContent, RevisionMissing

NAMES = st.text("ab.-_é", min_size=1, max_size=4).filter(lambda n: n not in (".", ".."))
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


def is_a_tree(paths) -> bool:
    return not any(a != b and b.startswith(a + "/") for a in paths for b in paths)


FILES = st.dictionaries(PATHS, st.binary(max_size=20), min_size=1, max_size=6).filter(is_a_tree)


@pytest.mark.skipif(shutil.which("git") is None, reason="compares with git")
def test_hashes_are_those_of_git(tmp_path):
    first = {"a.txt": b"1", "a/b/c.txt": b"2", "a-b": b"3", "a/b.txt": b"4", "z/é.txt": b"5"}
    second = {"a.txt": b"6", "a/b/c.txt": None}
    repo = HubContent().add("x/y", first)
    ours = [repo.resolve().sha, repo.commit(second, message="second")]

    theirs = []
    for files, message, minute in ((first, "initial commit", 0), (second, "second", 1)):
        for name, data in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink() if data is None else path.write_bytes(data)
        theirs.append(git_commit(tmp_path, message, minute))
    assert ours == theirs


def git_commit(folder, message: str, minute: int) -> str:
    who = {"NAME": "metaflow-hf", "EMAIL": "demo@localhost", "DATE": f"{1704067200 + 60 * minute} +0000"}
    identity = {f"GIT_{role}_{key}": v for role in ("AUTHOR", "COMMITTER") for key, v in who.items()}
    environment = {**os.environ, **identity, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", message]):
        subprocess.run(["git", *command], cwd=folder, env=environment, check=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=folder, text=True).strip()


@given(FILES)
def test_the_order_of_files_changes_nothing(files):
    backwards = dict(reversed(files.items()))
    assert HubContent().add("x/y", files).resolve().sha == HubContent().add("x/y", backwards).resolve().sha


@given(FILES, st.data())
def test_any_changed_byte_changes_the_commit(files, data):
    path = data.draw(st.sampled_from(sorted(files)))
    changed = {**files, path: files[path] + b"!"}
    assert HubContent().add("x/y", files).resolve().sha != HubContent().add("x/y", changed).resolve().sha


def test_a_revision_is_a_branch_a_tag_a_pull_request_or_a_hash():
    repo = HubContent().add("x/y", {"a": b"1"})
    old = repo.resolve().sha
    repo.tag("v1.0")
    new = repo.commit({"a": b"2"})
    proposed = repo.commit({"a": b"3"}, branch="refs/pr/7")

    assert repo.resolve("main").sha == new
    assert repo.resolve("v1.0").sha == repo.resolve(old).sha == repo.resolve(old[:7]).sha == old
    assert repo.resolve("refs/pr/7").sha == proposed
    assert [c.sha for c in repo.history("refs/pr/7")] == [proposed, new, old]
    for unknown in ("v2.0", old[:6], "0" * 40, ""):
        with pytest.raises(RevisionMissing):
            repo.resolve(unknown)


def test_old_commits_stay_as_they_were():
    repo = HubContent().add("x/y", {"a": b"1", "b": b"1"})
    old = repo.resolve()
    repo.commit({"a": b"2", "b": None, "c": b"3"})
    assert {p: f.data for p, f in repo.resolve(old.sha).files.items()} == {"a": b"1", "b": b"1"}
    assert set(repo.resolve().files) == {"a", "c"}


def test_deleting_what_is_not_there_is_refused_and_changes_nothing():
    repo = HubContent().add("x/y", {"a": b"1"})
    before = repo.resolve().sha
    with pytest.raises(KeyError, match="no file 'b'"):
        repo.commit({"a": b"2", "b": None})
    assert repo.resolve().sha == before


def test_a_repository_is_built_once_and_only_when_asked_for():
    built = []

    def build():
        built.append(1)
        return {"a": b"1"}

    content = HubContent()
    repo = content.add("x/y", build, then=lambda r: r.tag("v1"))
    assert content.repos("model") == [repo]
    assert built == []
    assert repo.resolve("v1").sha == repo.resolve("main").sha
    assert built == [1]


def test_a_builder_that_failed_may_be_tried_again():
    answers = iter([OSError("disk"), {"a": b"1"}])

    def build():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    repo = HubContent().add("x/y", build)
    with pytest.raises(OSError, match="disk"):
        repo.resolve()
    assert set(repo.resolve().files) == {"a"}


@pytest.mark.parametrize(
    ("path", "size", "is_lfs"),
    [
        ("model.safetensors", 10, True),
        ("a/b.bin", 1, True),
        ("config.json", 1 << 20, False),
        ("config.json", (1 << 20) + 1, True),
        ("empty.bin", 0, False),
    ],
)
def test_large_and_binary_files_go_by_lfs(path, size, is_lfs):
    assert HubFile.of(path, bytes(size)).is_lfs is is_lfs
