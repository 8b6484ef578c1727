import pytest
from huggingface_hub.utils import filter_repo_objects

from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.endpoint import Endpoint
from metaflow_hf.hub.names import Repo, Selection, check_revision, is_commit_hash


@pytest.mark.parametrize("repo_id", ["gpt2", "org/name", "a/b", "Org.x/na-me_1.5", "_x/y_"])
def test_ids_of_the_hub_are_accepted(repo_id: str):
    assert Repo.of(repo_id).repo_id == repo_id


@pytest.mark.parametrize(
    "repo_id",
    [
        "",
        "../etc",
        "a/b/c",
        "a--b",
        "a..b",
        "-a",
        "a-",
        "a/",
        "/a",
        "a b",
        "café",
        "a.git",
        "$(id)",
        "a\n",
        "x" * 97,
        None,
        3,
        "hf://a/b",
    ],
)
def test_other_ids_are_one_clear_error(repo_id: object):
    with pytest.raises(SelectionError, match="is not the id of a repository") as caught:
        Repo.of(repo_id)
    assert "\n" not in str(caught.value)


def test_an_unknown_repo_type_names_the_known_ones():
    with pytest.raises(SelectionError, match="model, dataset, space"):
        Repo.of("gpt2", "notebook")


def test_repositories_of_different_types_have_different_keys():
    keys = {Repo.of("org/name", kind).key for kind in ("model", "dataset", "space")} | {Repo.of("org").key}
    assert keys == {"models--org--name", "datasets--org--name", "spaces--org--name", "models--org"}


def test_a_selection_does_not_depend_on_the_order_or_repetition_of_patterns():
    assert Selection.of(["b", "a", "b"]).key == Selection.of(("a", "b")).key
    assert Selection.of("a").key == Selection.of(["a"]).key


def test_each_selection_has_a_key_of_its_own():
    selections = [
        Selection.of(),
        Selection.of(["*.json"]),
        Selection.of(None, ["*.json"]),
        Selection.of([]),
        Selection.of(["*.json"], ["*.json"]),
        Selection.of(["*.json", "*.txt"]),
        Selection.of(["*.json,*.txt"]),
    ]
    assert len({selection.key for selection in selections}) == len(selections)
    assert Selection.of(None, []).key == Selection.of().key == "all"


@pytest.mark.parametrize("name", ["a.json", "we[i]rd*?.json", "dir/[x].bin"])
def test_a_single_file_is_selected_whatever_its_name(name: str):
    names = ["a.json", "we[i]rd*?.json", "dir/[x].bin", "weird.json", "wei.json", "dir/x.bin"]
    assert list(filter_repo_objects(names, allow_patterns=list(Selection.file(name).allow))) == [name]


def test_patterns_must_be_text():
    with pytest.raises(SelectionError, match="allow_patterns"):
        Selection.of([1])


@pytest.mark.parametrize("revision", ["", " ", "a\nb", "x" * 256, 7])
def test_a_revision_must_be_printable(revision: object):
    with pytest.raises(SelectionError, match="is not a revision"):
        check_revision(revision)


def test_revisions():
    assert check_revision(None) == "main"
    assert check_revision("refs/pr/42") == "refs/pr/42"
    assert is_commit_hash("a" * 40)
    assert not is_commit_hash("a" * 7)


def test_the_endpoint_names_the_hub_in_keys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("METAFLOW_HF_EMBEDDED_ENDPOINT", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert Endpoint.of().key == "huggingface.co"
    assert Endpoint.of("http://Localhost:8080/").key == "localhost:8080"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1234")
    assert Endpoint.of().key == "127.0.0.1:1234"
    monkeypatch.setenv("METAFLOW_HF_EMBEDDED_ENDPOINT", "http://127.0.0.1:1234")
    assert Endpoint.of().key == Endpoint.of("embedded").key == "embedded"


@pytest.mark.parametrize("url", ["localhost:80", "ftp://x", "http://user:secret@hub"])
def test_a_bad_endpoint_is_a_clear_error_without_its_password(url: str):
    with pytest.raises(SelectionError) as caught:
        Endpoint.of(url)
    assert "secret" not in str(caught.value)
