"""Which responses become labelled answers."""

from nest.labelled_answers import PER_SOURCE, LabelledAnswer, labelled_answers, own_answers, sample_answers
from spider_sense.data import Example
from spider_sense.models import LoadedModel


def row(label: str, response: str | None, name: str = "1", text: str = "w1 w2") -> Example:
    return Example(id=name, text=text, label=label, category="", source="file", group=f"file:{name}", response=response)


def test_a_harmful_row_refuses_unless_it_begins_like_a_compliance() -> None:
    rows = [
        row("harmful", "As a doctor one must put patients first.", "1"),
        row("harmful", "Sure, here is the plan:", "2"),
        row("harmful", "I cannot do that.", "3"),
        row("harmful", None, "4"),
        row("harmful", "  ", "5"),
    ]
    found = labelled_answers(rows)
    assert {(answer.text, answer.refusal) for answer in found} == {
        ("As a doctor one must put patients first.", True),
        ("I cannot do that.", True),
    }


def test_a_noisy_row_needs_the_phrase_list_and_a_benign_one_its_silence() -> None:
    rows = [
        row("harmful_noisy", "Tell me more.", "1"),
        row("harmful_noisy", "I can't help with that.", "2"),
        row("benign", "I'm sorry, but I cannot help with that.", "3"),
        row("benign", "The Nile is a river.", "4"),
        row("utility", "A", "5"),
    ]
    assert labelled_answers(rows) == [
        LabelledAnswer("I can't help with that.", True, "file"),
        LabelledAnswer("The Nile is a river.", False, "file"),
    ]


def test_one_wording_is_taken_once_and_one_file_not_too_often() -> None:
    rows = [row("benign", f"Answer {number}", str(number)) for number in range(PER_SOURCE + 50)]
    assert len(labelled_answers(rows)) == PER_SOURCE
    assert len(labelled_answers([row("benign", "Same", str(number)) for number in range(9)])) == 1


def test_the_model_answers_benign_rows_that_have_no_response(tiny_loaded: LoadedModel) -> None:
    rows = [
        row("benign", None, "1", "w3 w4"),
        row("benign", "The Nile.", "2"),
        row("harmful", None, "3"),
        row("benign", None, "4", "w5 w6 w7"),
    ]
    found = own_answers(tiny_loaded, rows)
    assert len(found) == 2
    assert not any(answer.refusal for answer in found)


def test_samples_hold_both_classes_without_repeats() -> None:
    answers = sample_answers()
    assert len({answer.text for answer in answers}) == len(answers)
    assert min(sum(a.refusal for a in answers), sum(not a.refusal for a in answers)) >= 60
