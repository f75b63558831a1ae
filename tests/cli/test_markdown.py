"""Markdown drawn as it streams: however the text is cut into tokens, the same rows stand on the terminal at the end."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from localmoe.cli.inline import inline
from localmoe.cli.markdown import MarkdownView
from localmoe.cli.render import highlight, markdown_table
from localmoe.cli.row import AFRESH, Row
from localmoe.cli.styled import cells, width, wrap

TEXT = """# A heading with **bold** words

Some *emphasised* text and `code here` in a paragraph that is long enough to be wrapped over several rows, with a \
[link](http://example.com/a) and 2 * 3 * 4 and snake_case_name, \\(a_1 * b_2\\) too.
- an item that is long enough to need another row, **bold across a couple of words here** and more
  - nested item
1. first
> a quotation that goes on and on until it has to be wrapped somewhere near the end of it

龍は空を飛ぶ。今日は天気がいいですね、散歩に行きましょう。そして家に帰る。 👩‍👩‍👧 family ❤️ heart

```python
def f(x):
    return "a" * 3  # comment
```

| a | b |
|---|--:|
| 1 | 2 |
| **x** | y |

---
The end, with an unclosed **bold and `code
"""


def draw(text: str, columns: int, pieces: Iterator[str] | None = None) -> tuple[list[str], list[str]]:
    """What was written, and the rows that stand at the end."""
    written: list[str] = []
    view = MarkdownView(Row(written.append, lambda: columns), highlight, markdown_table)
    for piece in pieces or iter([text]):
        view.push(piece)
    view.finish()
    rows = "".join(written).split("\n")
    return written, [without_styles(row.split(AFRESH)[-1]) for row in rows]


def without_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def cut(text: str, seed: int) -> Iterator[str]:
    chosen = random.Random(seed)
    while text:
        length = chosen.randrange(1, 8)
        yield text[:length]
        text = text[length:]


@pytest.mark.parametrize("columns", [100, 40, 20])
def test_the_same_rows_however_it_is_cut(columns):
    _, whole = draw(TEXT, columns)
    for seed in range(10):
        _, rows = draw(TEXT, columns, cut(TEXT, seed))
        assert rows == whole
    assert all(width(row) < columns for row in whole if "comment" not in row)  # code is left to the terminal


def test_what_it_draws():
    written, rows = draw(TEXT, 80)
    assert rows[0] == "A heading with bold words"
    assert "and 2 * 3 * 4 and snake_case_name," in " ".join(rows)
    assert "\\(a_1 * b_2\\) too." in " ".join(rows)
    assert "• an item that is long enough to need another row, bold across a couple of" in rows
    assert "  words here and more" in rows
    assert "  • nested item" in rows
    assert "The end, with an unclosed **bold and `code" in rows
    assert '    return "a" * 3  # comment' in rows
    assert any(re.search("\x1b\\[[0-9;]*3[0-9]m.*comment", piece) for piece in written)  # coloured


def test_no_word_is_lost_whatever_the_text():
    chosen = random.Random(1)
    pool = ["word ", "a", "**", "*", "`", "_", "龍", "\n", "- ", "> ", "# ", " ", "[x](y)", "1. ", "~~", "👩‍👧"]
    for _ in range(300):
        text = "".join(chosen.choices(pool, k=40))
        _, rows = draw(text, 30, cut(text, chosen.randrange(1000)))
        for letter in "wa龍👩":
            assert "".join(rows).count(letter) == text.count(letter), text


def test_only_the_current_row_changes_and_plain_text_is_only_added_to():
    written, _ = draw("", 40, iter(["Once ", "upon ", "a ", "time ", "there ", "was ", "a fox"]))
    assert "".join(written) == "Once upon a time there was a fox\n"
    written, _ = draw(TEXT, 40, cut(TEXT, 0))
    assert not re.search(r"\x1b\[[0-9;]*[A-HJfsu]", "".join(written))  # the cursor never leaves its row


def test_a_terminal_that_gets_narrower():
    columns = [60]
    written: list[str] = []
    view = MarkdownView(Row(written.append, lambda: columns[0]), highlight, markdown_table)
    view.push("Once upon a time there was a fox who ")
    columns[0] = 20
    view.push("lived in a **forest** far away ")
    view.finish()
    rows = [row.split(AFRESH)[-1] for row in without_styles("".join(written)).split("\n")]
    assert all(width(row) < 20 for row in rows[2:])
    assert "forest" in "".join(rows)


def test_a_joined_emoji_split_over_tokens_is_one_cell():
    assert [cell.text for cell in cells([("", "a👩‍👩‍👧é")])] == ["a", "👩‍👩‍👧", "é"]
    _, rows = draw("", 40, iter(["see 👩", "‍", "👩‍", "👧 ok"]))
    assert rows[0] == "see 👩‍👩‍👧 ok"


def test_rows_are_stable_as_a_line_grows():
    line = cells([("", TEXT.replace("\n", " "))])
    before: list[tuple[int, int]] = []
    for length in range(1, len(line)):
        rows = wrap(line[:length], 30, 28)
        assert rows[: max(len(before) - 1, 0)] == before[:-1] or rows[: len(before) - 2] == before[:-2]
        before = rows


@pytest.mark.parametrize(
    ("text", "spans", "rest"),
    [
        ("a **b", [("", "a ")], "**b"),
        ("a **b** c", [("", "a "), ("1", "b"), ("", " c")], ""),
        ("2 * 3", [("", "2 * 3")], ""),
        ("a_b_c", [("", "a_b_c")], ""),
        ("[x](", [], "[x]("),
        ("`a`", [], "`a`"),
        ("`a` ", [("36", "a"), ("", " ")], ""),
    ],
)
def test_inline(text, spans, rest):
    assert inline(text, final=False) == (spans, rest)


def test_a_mark_without_a_partner_is_text_for_good():
    text = "**" + "x" * 300
    assert inline(text, final=False) == ([("", text)], "")
    assert inline(text + "** ", final=False) == ([("", text + "** ")], "")
