from spider_sense.reporting.pieces import pieces


class Bytes:
    """A tokenizer whose tokens are single bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"


class Marked:
    """A tokenizer that drops the space before a word, as SentencePiece does for a token on its own."""

    def decode(self, ids: list[int]) -> str:
        return "".join("word" for _ in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return "\u2581word" if token else "word"


def test_a_character_over_several_tokens_is_shown_at_the_last() -> None:
    assert pieces(Bytes(), list("a\u6771b".encode())) == ["a", "", "", "\u6771", "b"]


def test_bytes_that_are_no_text_do_not_swallow_what_follows() -> None:
    shown = pieces(Bytes(), [0xFF, 0xFF, 0xFF, 0xFF, *b"ok"])
    assert len(shown) == 6
    assert "".join(shown).endswith("ok")


def test_the_space_before_a_word_is_kept() -> None:
    assert pieces(Marked(), [0, 1]) == ["word", " word"]
