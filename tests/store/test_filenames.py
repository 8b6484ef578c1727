import pytest

from metaflow_hf.errors import SelectionError
from metaflow_hf.store.filenames import check_filename, check_filenames


@pytest.mark.parametrize(
    "name",
    ["config.json", ".gitattributes", "a/b/c.txt", "model 1.bin", "weights.v1..2", "ü/日本.txt", "x" * 255],
)
def test_usual_names_pass(name: str):
    assert check_filename(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../up",
        "a/../../up",
        "a/./b",
        "a//b",
        "a/",
        "C:/windows",
        "c:evil",
        "a\\b",
        "a\0b",
        "a\nb",
        "con",
        "dir/NUL.txt",
        "aux.json",
        "x" * 256,
        "/".join(["x" * 200] * 5),
        "\udcff",
        "dir/d:/x",
        "a\x85b",
        "com¹.txt",
        "CONIN$",
        "con .txt",
        "config.json.",
        "dir./x",
        "trailing ",
    ],
)
def test_names_that_may_leave_their_directory_are_refused(name: str):
    with pytest.raises(SelectionError, match="is refused because it"):
        check_filename(name)


@pytest.mark.parametrize(
    "names",
    [
        ["a", "A"],
        ["dir/x", "DIR/X"],
        ["a", "a"],
        ["a", "a/b"],
        ["A/b", "a"],
        ["\u00e9", "e\u0301"],
        ["\u00c9/x", "e\u0301/X"],
    ],
)
def test_names_that_mean_one_file_on_some_system_are_refused(names: list[str]):
    with pytest.raises(SelectionError):
        check_filenames(names)


def test_files_in_common_folders_pass():
    check_filenames(["a/b", "a/c", "a.txt", "b/a"])
