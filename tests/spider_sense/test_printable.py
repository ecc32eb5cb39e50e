from spider_sense.printable import printable


def test_characters_that_reorder_or_hide_text_are_spelled_out() -> None:
    assert printable("a\u202eb\x00c\u200bd\ne") == "a[U+202E]b[U+0000]c[U+200B]d\ne"
