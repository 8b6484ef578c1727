import pytest

from metaflow_hf.errors import SelectionError
from metaflow_hf.hub.loadspec import ModelEntry, parse_models, parse_snapshots, without_tokens


def simple(load: object) -> list[tuple]:
    return [(e.name, e.repo_id, dict(e.arguments), e.path) for e in parse_snapshots(load)]


@pytest.mark.parametrize(
    ("load", "entries"),
    [
        (None, []),
        ("org/name", [("org/name", "org/name", {}, None)]),
        ("org/name@v2", [("org/name@v2", "org/name", {"revision": "v2"}, None)]),
        (["gpt2", "bert"], [("gpt2", "gpt2", {}, None), ("bert", "bert", {}, None)]),
        (("gpt2", "./here"), [("gpt2", "gpt2", {}, "./here")]),
        ([("gpt2", "./here")], [("gpt2", "gpt2", {}, "./here")]),
        ([["gpt2", "./here"]], [("gpt2", "gpt2", {}, "./here")]),
        (
            {"repo_id": "gpt2", "allow_patterns": ["*.json"], "path": "p"},
            [("gpt2", "gpt2", {"allow_patterns": ["*.json"]}, "p")],
        ),
        ([{"repo_id": "gpt2"}], [("gpt2", "gpt2", {}, None)]),
        (
            {"base": "org/name@v2", "tokens": {"repo_id": "org/name", "revision": "v1"}},
            [
                ("base", "org/name", {"revision": "v2"}, None),
                ("tokens", "org/name", {"revision": "v1"}, None),
            ],
        ),
        (
            {"base": ("org/name", "here"), "other": ["gpt2", "there"]},
            [("base", "org/name", {}, "here"), ("other", "gpt2", {}, "there")],
        ),
        ([{"base": "gpt2"}, "bert"], [("base", "gpt2", {}, None), ("bert", "bert", {}, None)]),
    ],
)
def test_forms_of_load(load: object, entries: list[tuple]):
    assert simple(load) == entries


def test_two_revisions_of_one_repository_keep_their_own_names():
    entries = parse_snapshots([{"repo_id": "gpt2"}, {"repo_id": "gpt2", "revision": "v1"}, "gpt2@v2"])
    assert [entry.name for entry in entries] == ["gpt2", "gpt2@v1", "gpt2@v2"]


@pytest.mark.parametrize("first", [{"repo_id": "gpt2", "revision": "v1"}, {"repo_id": "gpt2"}])
def test_the_order_of_two_revisions_does_not_change_their_names(first: dict):
    second = {"repo_id": "gpt2"} if "revision" in first else {"repo_id": "gpt2", "revision": "v1"}
    names = {entry.name: entry.arguments.get("revision") for entry in parse_snapshots([first, second])}
    assert names == {"gpt2": None, "gpt2@v1": "v1"}


def test_two_entries_that_would_hide_each_other_are_an_error():
    with pytest.raises(SelectionError, match="twice.*names of their own"):
        parse_snapshots([{"repo_id": "gpt2", "allow_patterns": "a"}, {"repo_id": "gpt2"}])


@pytest.mark.parametrize(
    "load", [3, [3], [("a", "b", "c")], ("gpt2", 3), [None], "bad id", {"a": None}, ("gpt2", "")]
)
def test_anything_else_is_refused(load: object):
    with pytest.raises(SelectionError):
        parse_snapshots(load)


def test_the_dict_of_the_user_is_not_changed():
    load = {"repo_id": "gpt2", "path": "p", "token": "hf_x"}
    before = dict(load)
    parse_snapshots(load)
    without_tokens(load)
    assert load == before


def test_tokens_are_taken_out_at_any_depth():
    load = [{"repo_id": "a", "token": "hf_x"}, {"base": {"repo_id": "b", "headers": {"a": "b"}}}, ("c", "p")]
    clean, had_token = without_tokens(load)
    assert had_token
    assert clean == [{"repo_id": "a"}, {"base": {"repo_id": "b"}}, ("c", "p")]
    assert without_tokens(clean) == (clean, False)


@pytest.mark.parametrize(
    ("load", "entries"),
    [
        (None, []),
        ("ref", [ModelEntry("ref")]),
        (["a", "b"], [ModelEntry("a"), ModelEntry("b")]),
        (("a", "p"), [ModelEntry("a", "p")]),
        ([("a", "p"), ("b", None)], [ModelEntry("a", "p"), ModelEntry("b")]),
        ({"a": "p", "b": None}, [ModelEntry("a", "p"), ModelEntry("b")]),
    ],
)
def test_forms_of_model_load(load: object, entries: list[ModelEntry]):
    assert parse_models(load) == entries


@pytest.mark.parametrize("load", [3, "", [("a", 3)], [("a", "b", "c")], ["a", "a"]])
def test_other_forms_of_model_load_are_refused(load: object):
    with pytest.raises(SelectionError):
        parse_models(load)
