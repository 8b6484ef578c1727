"""Models beside each other: the table, the best one marked, and text of others that stays text."""

import html
import math

from metaflow_hf.report import Compared, best_first, comparison_page, comparison_text
from metaflow_hf.report.page import Chart, Grid, Tiles, fragment


def compared(name, bits):
    return Compared(
        name=name,
        key=f"models/{name}",
        loss=bits * 2,
        perplexity=7.389,
        bits_per_byte=bits,
        tokens=1234,
        samples=(("The <b>", f"{name} wrote `this`"),),
    )


def test_the_table_and_the_page_name_the_best():
    found = [compared("TrainFlow/2", 1.25), compared("TrainFlow/1", 1.5)]
    lines = comparison_text(found).splitlines()
    assert lines[0] == "Models, best first"
    assert lines[1].split() == [
        "model",
        "bits",
        "per",
        "byte",
        "loss",
        "(nats/token)",
        "perplexity",
        "tokens",
    ]
    assert lines[2].split() == ["TrainFlow/2", "1.250", "2.500", "7.39", "1,234"]
    page = comparison_page(found)
    [table] = [block for block in page.blocks if isinstance(block, Grid) and block.strong_rows]
    assert table.strong_rows == {0}
    shown = " ".join(fragment(block) for block in page.blocks if not isinstance(block, Chart))
    assert "<b>1.25" not in shown
    assert "TrainFlow/1 wrote `this`" in html.unescape(shown)
    assert "prompt: The <b>" in html.unescape(shown)


def test_what_is_not_a_number_is_not_the_best():
    found = [compared("b", 1.5), compared("broken", math.nan), compared("far", math.inf), compared("a", 1.0)]
    assert [one.name for one in best_first(found)] == ["a", "b", "far", "broken"]
    [tiles] = [block for block in comparison_page(found[1:]).blocks if isinstance(block, Tiles)]
    assert tiles.tiles[0].value == "a"


def test_one_model_alone_is_measured_and_not_called_best():
    page = comparison_page([compared("a\n\x1b[31mb", 1.0)])
    assert page.blocks[0].text == "1 model measured"
    assert "\x1b" not in comparison_text([compared("a\n\x1b[31mb", 1.0)])
