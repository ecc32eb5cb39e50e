"""What a template wrote and what was typed are told apart by rendering marks."""

import pytest

from spider_sense.typed import mark, pieces


def test_contents_are_found_where_they_were_put() -> None:
    frame = f'<a>{mark(0)}<b>{{"{mark(1)}": 0}}<c>'
    assert pieces('<a>x<b>{"k": 1}<c>', frame, [("x",), ('{"k": 1}',)]) == [
        ("<a>", None),
        ("x", 0),
        ("<b>", None),
        ('{"k": 1}', 1),
        ("<c>", None),
    ]


def test_a_content_that_holds_the_template_s_words_is_one_piece() -> None:
    assert pieces("<a>x<b>y<a><b>", f"<a>{mark(0)}<b>", [("x<b>y<a>",)])[1] == ("x<b>y<a>", 0)


def test_of_two_forms_the_one_counts_that_the_rest_follows() -> None:
    # Trimmed, and followed by a line break of the template's: the longer form fits as well, but not what comes then.
    assert pieces("<a>x\n<b>", f"<a>{mark(0)}\n<b>", [("x\n", "x")]) == [("<a>", None), ("x", 0), ("\n<b>", None)]


@pytest.mark.parametrize("text", ["<a>X<b>", "<a>x<c>", "<a>x<b>!", "<a>"])
def test_what_was_rewritten_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="the template wrote"):
        pieces(text, f"<a>{mark(0)}<b>", [("x",)])
