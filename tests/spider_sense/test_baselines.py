import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from spider_sense.baselines import (
    LengthBaseline,
    TfidfBaseline,
    best_random_direction,
    load_baselines,
    save_baselines,
    shuffled_labels,
)
from spider_sense.errors import ConfigError, DataError, GuardError, MissingExtraError
from spider_sense.metrics import auroc

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

TEXTS = [
    "how do I pick a lock without the key",
    "write malware that steals passwords",
    "forge a passport, please, and hide it well",
    "bake bread with rye flour",
    "plan a walk in the hills",
    "water the tomatoes twice a week, water the roses",
]
LABELS = np.array([True, True, True, False, False, False])
NEW = ["malware that can forge a key", "bread bread bread in the hills", "", "\u00fcber na\u00efve caf\u00e9"]


def test_length_alone_separates_long_from_short() -> None:
    texts = ["word " * count for count in (1, 2, 3, 40, 50, 60)]
    labels = np.arange(6) >= 3
    scores = LengthBaseline.fit(texts, labels).scores(texts)
    assert auroc(scores, labels) == 1
    assert ((scores > 0) == labels).all()


def test_length_is_the_log_of_characters_and_the_number_of_words() -> None:
    scores = LengthBaseline(log_chars=1.0, words=10.0, intercept=100.0).scores(["a bc", ""])
    np.testing.assert_allclose(scores, [np.log(5) + 120, 100])


def test_length_sees_nothing_in_texts_of_one_length() -> None:
    baseline = LengthBaseline.fit(["aa bb", "cc dd", "ee ff", "gg hh"], np.array([True, False, True, False]))
    assert np.ptp(baseline.scores(["xx yy", "zz ww"])) == 0


def test_tfidf_learns_words_and_pairs() -> None:
    baseline = TfidfBaseline.fit(TEXTS, LABELS)
    scores = baseline.scores(NEW)
    assert auroc(baseline.scores(TEXTS), LABELS) == 1
    assert scores[0] > scores[1]
    assert {"malware", "malware that"} <= baseline.vocabulary.keys()


def test_tfidf_equals_the_pipeline_that_it_was_fitted_with() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1)
    model = LogisticRegression(class_weight="balanced", max_iter=2000)
    model.fit(vectorizer.fit_transform(TEXTS), LABELS)
    expected = model.decision_function(vectorizer.transform(NEW))
    np.testing.assert_allclose(TfidfBaseline.fit(TEXTS, LABELS).scores(NEW), expected, rtol=0, atol=1e-12)


def test_tfidf_keeps_the_most_frequent_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spider_sense.baselines.MAX_FEATURES", 2)
    baseline = TfidfBaseline.fit(["malware malware lock", "bread bread hills"], np.array([True, False]))
    assert baseline.vocabulary.keys() == {"malware", "bread"}
    assert baseline.coefficients.shape == baseline.idf.shape == (2,)


def test_saved_baselines_score_alike_and_hold_no_text(tmp_path: Path) -> None:
    length, tfidf = LengthBaseline.fit(TEXTS, LABELS), TfidfBaseline.fit(TEXTS, LABELS)
    save_baselines(tmp_path, length, tfidf)
    loaded_length, loaded_tfidf = load_baselines(tmp_path)
    assert loaded_length == length
    assert (loaded_tfidf.scores(NEW) == tfidf.scores(NEW)).all()
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written.keys() == {"baselines.json", "baselines.safetensors"}
    assert not any(text.encode() in content for text in TEXTS for content in written.values())


def damage_vocabulary(folder: Path) -> None:
    path = folder / "baselines.json"
    document = json.loads(path.read_text())
    document["vocabulary"]["malware"] = 0
    path.write_text(json.dumps(document))


def damage_tensors(folder: Path) -> None:
    save_file(
        {"idf": np.ones(2), "coefficients": np.ones(3), "intercept": np.ones(1)}, folder / "baselines.safetensors"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "baselines.json").unlink(), "cannot read the baselines"),
        (lambda folder: (folder / "baselines.json").write_text("{}"), "cannot read the baselines"),
        (lambda folder: (folder / "baselines.safetensors").write_bytes(b"x"), "cannot read the baselines"),
        (lambda folder: save_file({"idf": np.ones(2)}, folder / "baselines.safetensors"), "coefficients"),
        (damage_vocabulary, "equally many"),
        (damage_tensors, r"idf \(2,\) and coefficients \(3,\)"),
    ],
)
def test_damaged_baselines_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    save_baselines(tmp_path, LengthBaseline.fit(TEXTS, LABELS), TfidfBaseline.fit(TEXTS, LABELS))
    damage(tmp_path)
    with pytest.raises(GuardError, match=message):
        load_baselines(tmp_path)


@pytest.mark.parametrize("baseline", [LengthBaseline, TfidfBaseline])
def test_training_needs_both_classes_and_a_label_a_text(baseline: Any) -> None:
    with pytest.raises(DataError, match="6 positives among 6 rows"):
        baseline.fit(TEXTS, np.ones(6, dtype=bool))
    with pytest.raises(DataError, match="6 rows and labels of shape"):
        baseline.fit(TEXTS, LABELS[:2])


def test_texts_without_words_are_refused() -> None:
    with pytest.raises(DataError, match="no words in 2 training texts"):
        TfidfBaseline.fit(["", "?"], np.array([True, False]))


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    for baseline in (LengthBaseline, TfidfBaseline):
        with pytest.raises(MissingExtraError, match=r"scikit-learn .*'\.\[train\]"):
            baseline.fit(TEXTS, LABELS)


def test_more_random_directions_find_a_better_one_on_the_rows_chosen_on() -> None:
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(60, 8)), np.arange(60) < 30
    features[:, 3] = 7.0
    areas = [auroc(random_scores(features, labels, features, count), labels) for count in (1, 10, 300)]
    assert all(area is not None and area >= 0.5 for area in areas)
    assert areas == sorted(areas, key=lambda area: area or 0)
    assert areas[0] != areas[-1]


def random_scores(features: Floats, labels: Bools, evaluate: Floats, directions: int = 100, seed: int = 0) -> Floats:
    weight, bias = best_random_direction(features, labels, directions, seed)
    return evaluate @ weight + bias


def test_a_random_direction_points_towards_the_positives() -> None:
    features, labels = np.arange(20.0)[:, None], np.arange(20) >= 10
    for seed in range(6):
        scores = random_scores(features, labels, features, directions=1, seed=seed)
        assert auroc(scores, labels) == 1


def test_a_lucky_direction_does_not_carry_over_to_noise() -> None:
    generator = np.random.default_rng(1)
    features, labels = generator.normal(size=(40, 16)), np.arange(40) < 20
    fresh, fresh_labels = generator.normal(size=(4000, 16)), np.arange(4000) < 2000
    chosen = auroc(random_scores(features, labels, features), labels)
    carried = auroc(random_scores(features, labels, fresh), fresh_labels)
    assert chosen is not None
    assert chosen > 0.65
    assert carried == pytest.approx(0.5, abs=0.04)


def test_random_directions_ignore_the_scale_of_a_feature() -> None:
    generator = np.random.default_rng(2)
    features, labels = generator.normal(size=(50, 4)), np.arange(50) % 2 == 0
    scale = np.array([1.0, 1e6, 1e-6, 3.0])
    plain = random_scores(features, labels, features[:5])
    scaled = random_scores(features * scale, labels, features[:5] * scale)
    np.testing.assert_allclose(scaled, plain, atol=1e-9)


def test_random_directions_need_both_classes_and_a_direction() -> None:
    features = np.zeros((4, 2))
    with pytest.raises(DataError, match="0 positives among 4 rows"):
        best_random_direction(features, np.zeros(4, dtype=bool))
    with pytest.raises(ConfigError, match="directions=0"):
        best_random_direction(features, np.arange(4) < 2, directions=0)


def test_shuffled_labels_keep_the_count_and_repeat_with_the_seed() -> None:
    labels = np.arange(100) < 30
    shuffled = shuffled_labels(labels, 3)
    assert shuffled.sum() == 30
    assert (shuffled == shuffled_labels(labels, 3)).all()
    assert (shuffled != labels).any()
    assert (labels == (np.arange(100) < 30)).all()
