"""The text of PDF files is what their authors wrote, not what a page shows of it."""

import pytest
from data.printed import BOLD, HEIGHT, MONO, SERIF, WIDTH, Printed, plain_pdf, wrapped

from metaflow_hf.data.manifest import Cursor
from metaflow_hf.data.rows import Unreadable
from metaflow_hf.data.sources.documents import read_document
from metaflow_hf.data.sources.local import LocalFile
from metaflow_hf.data.sources.pdf.hyphens import Vocabulary

SOFT = "\u00ad"
ONE = (
    "The li|brary reads doc|u|ments as peo|ple do, with|out the ac|ci|dents of the print|ed page: a ma|nip|u|la|tion of "
    "glyphs and boxes be|comes a se|quence of sen|ten|ces, and each of them is what some|body once had in mind be|fore a "
    "com|po|si|tor cut it in|to lines."
).replace("|", SOFT)
TWO = (
    "An|oth|er para|graph says some|thing else, at a length that needs sev|er|al lines on pa|per, so that there is "
    "some|thing to put to|geth|er again when the text is want|ed with|out the page that it was print|ed on by some|body."
).replace("|", SOFT)


@pytest.fixture
def read(tmp_path):
    """The rows of a PDF."""

    def rows(printed, documents="whole"):
        path = tmp_path / "x.pdf"
        path.write_bytes(printed if isinstance(printed, bytes) else printed.save())
        batches = read_document(LocalFile(path.name, path), Cursor(), documents=documents)
        return [row for batch in batches for row in batch.rows]

    return rows


@pytest.fixture
def text_of(read):
    """The text of a PDF as one."""

    def text(printed):
        (row,) = read(printed)
        return row["text"]

    return text


def plain(text):
    return text.replace(SOFT, "")


@pytest.mark.parametrize("separation", ["gap", "indent"])
def test_lines_become_paragraphs_and_cut_words_are_whole(text_of, separation):
    printed, indent = Printed(), 12 if separation == "indent" else 0
    lines = []
    for text in (ONE, TWO, ONE):
        lines += printed.prose(text, indent=indent)
        printed.gap(8 if separation == "gap" else 0)
    assert any(line.endswith("-") for line in lines), "nothing was cut"
    assert text_of(printed) == plain(f"{ONE}\n\n{TWO}\n\n{ONE}")


def test_a_document_is_one_row_and_a_paragraph_goes_on_over_the_page_end(read):
    printed = Printed(title="A  Book")
    first, second = wrapped_halves(ONE)
    printed.prose(TWO)
    printed.gap().paragraph(*first, ends=False)
    printed.page().paragraph(*second)
    printed.gap().prose(TWO)
    text = plain(f"{TWO}\n\n{ONE}\n\n{TWO}")
    about = {"source": "x.pdf", "format": "pdf", "title": "A Book"}
    assert read(printed) == [{"text": text, **about, "part": 1, "parts": 1, "pages": 2}]


def test_with_pages_each_page_is_a_row_with_the_same_cleaning(read):
    printed = Printed()
    first, second = wrapped_halves(ONE)
    for number, half in enumerate((first, second, ["The end."]), start=1):
        printed.put(50, HEIGHT - 40, "A Running Head").put(195, 30, str(number))
        printed.paragraph(*half, ends=half is not first)
        printed.page()
    rows = read(printed, documents="pages")
    texts = [" ".join(first), " ".join(second), "The end.", ""]
    assert [row["text"] for row in rows] == texts
    assert [(row["page"], row["pages"]) for row in rows] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def wrapped_halves(text):
    """The lines of a paragraph before a page end and after it; the last line before it is cut within a word."""
    lines = wrapped(text)
    at = next(number for number, line in enumerate(lines, start=1) if line.endswith("-"))
    return lines[:at], lines[at:]


@pytest.mark.parametrize(
    ("before", "after", "known", "joined"),
    [
        ("a manip-", "ulation of", "", "a manipulation of"),
        ("a well-", "known fact", "", "a well-known fact"),
        ("a block-", "sorting algorithm", "the block-sorting method", "a block-sorting algorithm"),
        ("the block-", "sorting algorithm", "sorting by block-wise steps", "the block-sorting algorithm"),
        ("a data-", "base system", "data in a database has a base", "a database system"),
        ("the file-", "name ends", "file-name, filename, filename", "the filename ends"),
        ("a Bayes-", "Markov chain", "", "a Bayes-Markov chain"),
        ("DIS-", "CLAIMED", "", "DISCLAIMED"),
        ("from 1990-", "1995 on", "", "from 1990-1995 on"),
        ("state-of-the-", "art", "", "state-of-the-art"),
        ("pre- and", "postfix", "", "pre- and postfix"),
        ("both pre-", "and postfix", "", "both pre- and postfix"),
        ("Haupt-", "und Nebensatz", "", "Haupt- und Nebensatz"),
        ("a dash -", "and more", "", "a dash - and more"),
        ("see https://example.org/a-", "b.html", "", "see https://example.org/a-b.html"),
        ("see https:", "//example.org", "", "see https://example.org"),
        ("data-", "driven", "the data", "data-driven"),
        ("and/", "or", "", "and/or"),
        ("Grü-", "ße", "", "Grüße"),
        ("hue-", "saturation-brightness", "", "hue-saturation-brightness"),
        ("これは一冊の", "本です。", "", "これは一冊の本です。"),
        ("see http://example.org/a-", "b", "", "see http://example.org/a-b"),
    ],
)
def test_the_hyphen_at_a_line_end_stays_where_the_document_says_so(before, after, known, joined):
    assert Vocabulary.of([known.split(), before.split(), after.split()]).joined(before, after) == joined


def test_a_compound_that_is_written_elsewhere_keeps_its_hyphen(text_of):
    text = ONE.replace("ma|nip|u|la|tion".replace("|", SOFT), "block-sorting")
    printed = Printed()
    printed.measure = 201
    lines = printed.prose(text)
    assert any(line.endswith("block-") for line in lines), "the compound is not cut"
    printed.gap().line("This is block-sorting.")
    assert text_of(printed) == plain(f"{text}\n\nThis is block-sorting.")


@pytest.mark.parametrize(
    ("head", "foot"),
    [
        (("The Manual", "The Manual"), ("{n}", "{n}")),
        (("The Manual", "Chapter {c}: On Things"), ("{n}", "{n}")),
        (("", ""), ("Page {n} of 8", "Page {n} of 8")),
        (("", ""), ("- {n} -", "- {n} -")),
        (("", ""), ("The Manual | {n}", "The Manual | {n}")),
        (("{n}{gap}The Manual", "Chapter {c}{gap}{n}"), ("", "")),
        (("The Manual", "An Author"), ("{roman}", "{roman}")),
        (("The Company Ltd.", "The Company Ltd."), ("Confidential", "{n}")),
        (("The Company Report {n}", "The Company Report {n}"), ("", "")),
    ],
    ids=["foot", "chapters", "of", "dashes", "bar", "outside", "roman", "two", "run"],
)
def test_running_heads_feet_and_page_numbers_are_left_out(text_of, head, foot):
    printed = Printed()
    roman = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii")
    for number in range(8):
        names = {"n": number + 7, "c": number // 3 + 1, "roman": roman[number], "gap": "{gap}"}
        for y, texts in ((HEIGHT - 40, head), (30, foot)):
            left, _, right = texts[number % 2].format(**names).partition("{gap}")
            if left:
                printed.put(50, y, left, size=9)
            if right:
                printed.put(320, y, right, size=9)
        printed.line(f"What page {number} says is short.")
        printed.page()
    expected = [f"What page {number} says is short." for number in range(8)]
    assert text_of(printed).split() == " ".join(expected).split()


@pytest.mark.parametrize(("size", "font"), [(14, BOLD), (10, SERIF)])
def test_what_merely_looks_like_a_running_head_stays(text_of, size, font):
    printed = Printed()
    for number in (1, 2, 3, 4):
        printed.line(f"Exercise {number}", size=size, font=font, leading=30)
        printed.line("Prove it." if number % 2 else "Why is that so?", leading=20)
        printed.line(f"There are {number * number + 1}.")
        printed.page()
    parts = [
        f"Exercise {n}\n\n{'Prove it.' if n % 2 else 'Why is that so?'}\nThere are {n * n + 1}."
        for n in (1, 2, 3, 4)
    ]
    assert text_of(printed) == "\n\n".join(parts)


def test_pages_that_say_the_same_and_nothing_else_keep_it(text_of):
    printed, form = Printed(), "Name of the applicant:\nHere I sign:"
    for number in range(3):
        printed.put(195, 30, str(number + 1))
        for line in form.split("\n"):
            printed.line(line)
        printed.page()
    printed.put(195, 30, "4").put(50, 300, "Send it to us.")
    assert text_of(printed) == f"{form}\n\n{form}\n\n{form}\n\nSend it to us."


def test_rows_that_repeat_within_the_text_stay(text_of):
    printed = Printed()
    for number in range(4):
        printed.line("Dear reader, I hope that you are well.").line(f"This is letter {number * number}.")
        printed.page()
    assert text_of(printed).count("Dear reader") == 4


def test_pages_of_nothing_but_numbers_keep_them(text_of):
    assert text_of(plain_pdf([f"Page {number}" for number in range(1, 6)])).split("\n\n") == [
        f"Page {number}" for number in range(1, 6)
    ]


def test_dots_of_a_table_of_contents_are_left_out(text_of):
    printed = Printed()
    printed.line("Contents", font=BOLD, size=14, leading=24)
    entries = [("1", "Introduction", "1"), ("1.1", "Why documents", "12"), ("A", "Licences", "A-1")]
    for number, name, page in entries:
        dots = ". " * (70 - len(number + name + page) * 2 // 2)
        printed.line(f"{number} {name} {dots}{page}")
    printed.line("Preface" + "." * 80 + "vii")
    printed.gap().line("Wait ..... what? Sign here: ..............")
    assert text_of(printed) == (
        "Contents\n\n1 Introduction\t1\n1.1 Why documents\t12\nA Licences\tA-1\nPreface\tvii\n\n"
        "Wait ..... what? Sign here: .............."
    )


@pytest.mark.parametrize("order", ["column by column", "line by line"])
def test_two_columns_are_read_one_after_the_other(text_of, order):
    printed, width = Printed(), 140
    both = [wrapped(ONE, width), wrapped(TWO, width)]
    rows = [(side, row) for side in (0, 1) for row in range(len(both[side]))]
    if order == "line by line":
        rows.sort(key=lambda place: (place[1], place[0]))
    for side, row in rows:
        is_last = row == len(both[side]) - 1
        printed.stretched(50 + 160 * side, 500 - 12 * row, both[side][row], width, is_last=is_last)
    assert text_of(printed) == plain(f"{ONE}\n\n{TWO}")


def test_a_table_is_no_pair_of_columns_and_keeps_its_cells(text_of):
    printed = Printed()
    printed.prose(ONE)
    printed.gap()
    table = [("Name", "Unit", "Value"), *((f"length {n}", "metre", f"{n * 7}.5") for n in range(8))]
    for cells in table:
        for x, cell in zip((50, 150, 200), cells, strict=True):
            printed.put(x, printed.at, cell)
        printed.at -= 12
    printed.gap().prose(TWO)
    rows = "\n".join("\t".join(cells) for cells in table)
    assert text_of(printed) == plain(f"{ONE}\n\n{rows}\n\n{TWO}")


def test_a_table_with_narrow_gaps_keeps_its_cells(text_of):
    printed = Printed()
    table = [("alpha", "one"), ("beta", "two"), ("gamma", "three")]
    for first, second in table:
        printed.put(50, printed.at, first).put(92, printed.at, second)
        printed.at -= 12
    assert text_of(printed) == "\n".join("\t".join(cells) for cells in table)


def test_lists_stay_lists(text_of):
    printed = Printed()
    printed.prose(ONE)
    items = [("•", TWO), ("•", "short"), ("1.", TWO), ("2.", "short"), ("-", TWO), ("-", "short")]
    printed.gap()
    for marker, text in items:
        printed.put(60, printed.at, marker)
        printed.left, printed.measure = 70, 262
        printed.prose(text)
        printed.left, printed.measure = 50, 282
    lines = "\n".join(f"{marker} {text}" for marker, text in items)
    assert text_of(printed) == plain(f"{ONE}\n\n{lines}")


def test_code_keeps_its_lines_and_its_indentation(text_of):
    code = 'def f(x):\n    if x:  # so-\n        return "a    b"\n\n    return None'
    printed = Printed()
    printed.prose(ONE)
    printed.gap()
    for line in code.split("\n"):
        depth = len(line) - len(line.lstrip())
        printed.put(60 + 5.4 * depth, printed.at, line.lstrip(), font=MONO, size=9)
        printed.at -= 11
    printed.gap().prose(TWO)
    assert text_of(printed) == plain(f"{ONE}\n\n{code}\n\n{TWO}")


def test_code_goes_on_over_the_page_end(text_of):
    printed = Printed()
    printed.prose(ONE)
    printed.gap()
    for page in (["for x in y:", "    print(x)"], ["    print(y)", "done()"]):
        for line in page:
            depth = len(line) - len(line.lstrip())
            printed.put(printed.left + 5.4 * depth, printed.at, line.lstrip(), font=MONO, size=9)
            printed.at -= 11
        printed.gap().prose(TWO) if page[-1] == "done()" else printed.page()
        # Left pages and right pages have different margins.
        printed.left = 70
    assert text_of(printed) == plain(f"{ONE}\n\nfor x in y:\n    print(x)\n    print(y)\ndone()\n\n{TWO}")


def test_names_of_code_within_a_paragraph_are_part_of_it(text_of):
    printed = Printed()
    for _ in range(2):
        printed.paragraph(
            "Some functions require an argument of the type, pointing to a place of", ends=False
        )
        printed.line("char[ASN1_MAX_ERROR_DESCRIPTION_SIZE_OF_IT_ALL_0]", font=MONO)
        printed.line("bytes.").gap()
    one = (
        "Some functions require an argument of the type, pointing to a place of "
        "char[ASN1_MAX_ERROR_DESCRIPTION_SIZE_OF_IT_ALL_0] bytes."
    )
    assert text_of(printed) == f"{one}\n\n{one}"


def test_lines_that_end_for_a_reason_stay_lines(text_of):
    printed = Printed()
    printed.prose(ONE)
    printed.gap()
    poem = ["Tyger Tyger, burning bright,", "In the forests of the night;", "What immortal hand or eye,"]
    for line in poem:
        printed.line(line)
    printed.gap().prose(TWO)
    assert text_of(printed) == plain(ONE + "\n\n" + "\n".join(poem) + "\n\n" + TWO)


def test_headings_are_apart_from_what_follows(text_of):
    printed = Printed()
    printed.line("1  Introduction", font=BOLD, size=14, leading=16)
    printed.prose(ONE)
    printed.line("Bold as the text", font=BOLD)
    printed.prose(TWO)
    assert text_of(printed) == plain(f"1 Introduction\n\n{ONE}\n\nBold as the text\n\n{TWO}")


def test_a_narrower_quotation_is_one_paragraph(text_of):
    printed = Printed()
    printed.prose(ONE)
    printed.gap()
    printed.left, printed.measure = 80, 230
    printed.prose(TWO + " " + ONE)
    printed.left, printed.measure = 50, 282
    printed.gap().prose(TWO)
    assert text_of(printed) == plain(f"{ONE}\n\n{TWO} {ONE}\n\n{TWO}")


def test_a_hanging_indent_is_one_paragraph(text_of):
    printed = Printed()
    for text in (ONE, TWO):
        printed.prose(text, hanging=20)
    assert text_of(printed) == plain(f"{ONE}\n\n{TWO}")


def test_text_goes_on_around_footnotes_and_figures(text_of):
    first, second = wrapped_halves(ONE)
    printed = Printed()
    printed.prose(TWO)
    printed.gap().paragraph(*first, ends=False)
    printed.put(50, 60, "1 A note in small letters.", size=8)
    printed.page().line("Figure 1: Nothing to see.", indent=90, size=8, leading=30)
    printed.paragraph(*second)
    assert text_of(printed) == plain(
        f"{TWO}\n\n{ONE}\n\n1 A note in small letters.\n\nFigure 1: Nothing to see."
    )


def test_turned_text_is_no_part_of_lines(text_of):
    printed = Printed()
    for number in range(3):
        printed.put(20, 200, "Drawn sideways", turned=90).put(120, 150, "DRAFT", size=60, turned=45)
        printed.prose((ONE, TWO, f"{TWO} {ONE}")[number])
        printed.page()
    assert text_of(printed) == plain(f"{ONE}\n\n{TWO}\n\n{TWO} {ONE}")


def test_a_page_that_lies_on_its_side_is_read_as_any_other(text_of):
    printed = Printed()
    for row, line in enumerate(("The first line of a page,", "and the second line.")):
        printed.put(100 + 12 * row, 50, line, turned=90)
    assert text_of(printed) == "The first line of a page,\nand the second line."


def test_superscripts_stay_in_their_line(text_of):
    printed = Printed()
    first, *rest = wrapped(ONE)
    printed.paragraph(first, ends=False).put(332, HEIGHT - 80 + 3.5, "2", size=6).paragraph(*rest)
    assert text_of(printed) == plain(ONE).replace(first, f"{first}2")


def test_ligatures_and_signs_of_other_fonts_are_plain_letters(text_of):
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFont

    pdfmetrics.registerFont(TTFont("Vera", "Vera.ttf"))
    assert text_of(Printed().line("the ﬁrst ﬂow\u00a0of", font="Vera")) == "the first flow of"


def test_a_damaged_page_is_named(read, monkeypatch):
    from metaflow_hf.data.sources.pdf import extraction

    read_page = extraction._read_page
    monkeypatch.setattr(
        extraction, "_read_page", lambda d, n, w: "Failed to load page." if n == 1 else read_page(d, n, w)
    )
    data = plain_pdf(["One letter.", "Lost letter.", "Last letter."])
    (row,) = read(data)
    assert row == Unreadable("page 2 of the PDF is damaged: Failed to load page.")
    first, second, third = read(data, documents="pages")
    assert (first["text"], third["text"]) == ("One letter.", "Last letter.")
    assert second == Unreadable("page 2 of the PDF is damaged: Failed to load page.")


def test_pages_that_are_pictures_are_named(read, caplog):
    printed = Printed().picture().page()
    printed.line("Words.").page().page().line("More words.")
    (row,) = read(printed)
    assert row["text"] == "Words.\n\nMore words."
    assert "x.pdf: 1 of 4 pages are pictures without text and need OCR first: 1" in caplog.messages


def test_one_font_for_everything_is_no_code(text_of):
    printed = Printed()
    assert (WIDTH, SERIF) == (400.0, "Times-Roman")
    for line in (
        "A typed letter has letters of one width, and",
        "therefore its lines are prose, nevertheless,",
        "as can be seen.",
    ):
        printed.line(line, font=MONO, size=11, leading=13)
    assert text_of(printed) == (
        "A typed letter has letters of one width, and therefore its lines are prose, nevertheless, as can be seen."
    )
