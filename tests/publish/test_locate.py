"""A failed cell is reported at its line of the text."""

import pytest

from handbook_src.publish.locate import line_of_cell, locate

TEXT = """---
kernelspec: {name: python3, display_name: Python 3, language: python}
---

# A

```{code-cell} ipython3
first
```

Words with a {ref}`wrong` reference.

````{code-cell}
:tags: [hide-input]

second
````

```{code-cell}
---
tags: [hide-input]
mystnb:
  image: {alt: "x"}
---

third
```
"""


@pytest.mark.parametrize(("number", "text"), [(0, "first"), (1, "second"), (2, "third")])
def test_the_first_line_of_code_is_found_past_tags_and_headers(tiny, number, text):
    path = tiny.page("a", TEXT)
    assert TEXT.splitlines()[line_of_cell(path, number) - 1] == text


def test_a_cell_that_is_not_there_has_no_line(tiny):
    assert line_of_cell(tiny.page("a", TEXT), 3) is None


def test_a_warning_about_a_cell_points_at_the_text(tiny):
    sentence = "Words with a {ref}`wrong` reference."
    tiny.chapter("a", "1", prose=sentence)
    assert tiny.build() == 0
    lines = (tiny.root / "book/a.md").read_text("utf8").splitlines()
    for place, suffix in (("10005", f":{lines.index(sentence) + 1}"), ("990001", "")):  # no cell 99
        message = f"{tiny.book.stage}/book/a.ipynb:{place}: WARNING: undefined label: 'wrong'"
        assert locate(message, tiny.book) == f"book/a.md{suffix}: WARNING: undefined label: 'wrong'"


def test_a_warning_about_a_plain_page_loses_the_stage(tiny):
    assert locate(f"{tiny.book.stage}/book/index.md:3: WARNING: x", tiny.book) == "book/index.md:3: WARNING: x"
