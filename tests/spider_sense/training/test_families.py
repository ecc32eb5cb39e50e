"""Every family, end to end: fitted on tiny synthetic activations, exported, read by the streaming scorer."""

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from spider_sense.activations import ActivationSet
from spider_sense.errors import ConfigError, DataError
from spider_sense.metrics import auroc
from spider_sense.scoring import Bank, Probe, Scorer
from spider_sense.training import gradient, pooling
from spider_sense.training.families import DESIGNS, FAMILIES, fit
from spider_sense.training.features import TrainingSet
from spider_sense.training.options import FitOptions
from spider_sense.types import Site

Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

WIDTH = 16
SITES = tuple(Site(layer, "resid") for layer in (1, 3, 5))
SHORT = FitOptions(epochs=8, batch=8, parts=2, hidden=8)
ALL = np.arange(40)


def synthetic(conversations: int, seed: int = 0) -> tuple[ActivationSet, Bools]:
    """Conversations of 1 to 30 rows, every third with a response; a positive leans to one direction at every site."""
    random = np.random.default_rng(seed)
    total = random.integers(1, 31, conversations)
    prompt = np.where(np.arange(conversations) % 3 == 0, random.integers(1, total + 1), total)
    labels = np.arange(conversations) % 2 == 0
    lean = np.random.default_rng(99).standard_normal((len(SITES), WIDTH))
    # One coordinate is far larger than the others, as in real models.
    scale = np.where(np.arange(WIDTH) == 5, 20.0, 1.0)
    rows = random.standard_normal((total.sum(), len(SITES), WIDTH)) + np.repeat(labels, total)[:, None, None] * lean
    hidden = torch.from_numpy(rows * scale + (np.arange(WIDTH) == 5) * 30.0)
    hidden /= hidden.square().mean(-1, keepdim=True).sqrt()
    data = ActivationSet(
        sites=SITES,
        ids=tuple(f"c{index}" for index in range(conversations)),
        hidden=hidden.half(),
        starts=np.concatenate(([0], np.cumsum(total))),
        prompt_rows=prompt,
        skips=np.full(conversations, 3),
        tail=1,
    )
    return data, labels


def streamed(probe: Probe, data: ActivationSet, index: int, scale: float = 1.0) -> float:
    """The streaming score at the last prompt row, of raw hidden states whose size is anything."""
    bank = Bank([probe])
    rows = data.hidden[data.rows(index)].float() * scale
    bank.begin(len(rows))
    for site in bank.sites:
        bank.tap(site)(rows[:, data.sites.index(site)])
    scorer = Scorer(bank)
    prompt = int(data.prompt_rows[index])
    _, trace = scorer.score_sequence(bank.logits(len(rows)), scorer.open("r", prompt_length=prompt, skip=0, tail=1))
    return float(trace[prompt - 1, 0])


def unit(data: ActivationSet, sites: tuple[Site, ...], rows: slice) -> Tensor:
    """Features as the scorer sees them: float16 leaves a root mean square that is not quite 1."""
    x = data.hidden[rows][:, data.site_index(sites)].float()
    return (x / x.square().mean(-1, keepdim=True).sqrt()).flatten(1)


def moving_average_max(logits: list[float], alpha: float) -> float:
    average, best, warm_up = 0.0, -math.inf, math.ceil(1 / alpha)
    for count, logit in enumerate(logits, start=1):
        average += max(alpha, 1 / count) * (logit - average)
        if count >= warm_up:
            best = max(best, average)
    return best if len(logits) >= warm_up else average


def pooled(family: str, logits: Tensor) -> float:
    """The score of one conversation: by the training pool, or by hand where inference reads the logits otherwise."""
    if family in ("swim", "topk"):
        return moving_average_max(logits[:, 0].tolist(), SHORT.alpha)
    if family == "multimax":
        return float(logits.amax(0).sum())
    pools = {
        "attention": pooling.attention,
        "mlp": pooling.mean,
        "rolling_attention": pooling.rolling_attention(10),
    }
    return float(pools[family](logits[None], torch.ones(1, len(logits), dtype=torch.bool)))


def holds_together(streaming: float, training: float) -> bool:
    return abs(streaming - training) <= 1e-5 * max(1.0, abs(training))


@pytest.mark.parametrize(
    ("family", "sites"),
    [(family, SITES[1:2]) for family in DESIGNS] + [(family, SITES[::-1]) for family in DESIGNS if family != "mlp"],
)
def test_the_streaming_score_of_the_exported_probe_equals_the_score_in_training(
    family: str, sites: tuple[Site, ...]
) -> None:
    data, labels = synthetic(40)
    probe = fit(family, data, ALL, labels, sites, "misuse", SHORT)
    rows = TrainingSet.of(data, ALL, labels, sites, None)
    model = gradient.train(DESIGNS[family](SHORT), rows, SHORT)
    spread = []
    for index in range(40):
        prompt = slice(data.rows(index).start, data.rows(index).start + int(data.prompt_rows[index]))
        with torch.no_grad():
            training = pooled(family, model(unit(data, sites, prompt) - model.mean_F))
        assert holds_together(streamed(probe, data, index, scale=1.0 + index), training)
        spread.append(training)
    assert np.std(spread) > 0.1


@pytest.mark.parametrize("sites", [SITES[1:2], SITES], ids=["one site", "three sites"])
@pytest.mark.parametrize("family", ["logistic", "mass_mean"])
def test_the_streaming_score_equals_the_linear_score_of_the_mean_of_the_prompt(
    family: str, sites: tuple[Site, ...]
) -> None:
    data, labels = synthetic(40)
    probe = fit(family, data, ALL, labels, sites, "misuse", SHORT)
    weight = torch.cat([probe.maps[site].weight for site in sites]).double()
    bias = sum(float(probe.maps[site].bias) for site in sites)
    for index in range(40):
        start = data.rows(index).start
        mean = unit(data, sites, slice(start, start + int(data.prompt_rows[index]))).double().mean(0)
        assert holds_together(streamed(probe, data, index, scale=7.0), float(mean @ weight) + bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_separates_what_is_easy(family: str) -> None:
    data, labels = synthetic(160)
    train, held_out = np.arange(80), np.arange(80, 160)
    sites = SITES[:1] if family == "mlp" else SITES[:2]
    probe = fit(family, data, train, labels, sites, "misuse", SHORT)
    scores = np.array([streamed(probe, data, int(index)) for index in held_out])
    area = auroc(scores, labels[held_out])
    assert area is not None
    assert area > 0.9
    assert probe.name == "misuse"
    assert probe.family == family
    assert set(probe.maps) == set(sites)


def weights_of(probe: Probe) -> Tensor:
    return torch.cat([torch.cat((item.weight.flatten(), item.bias)) for item in probe.maps.values()])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_probe_and_leaves_the_global_generator_alone(family: str) -> None:
    data, labels = synthetic(40)
    before = torch.get_rng_state()
    first, again = (fit(family, data, ALL, labels, SITES[:1], "misuse", SHORT) for _ in range(2))
    assert torch.equal(weights_of(first), weights_of(again))
    assert torch.equal(before, torch.get_rng_state())
    other = fit(family, data, ALL, labels, SITES[:1], "misuse", SHORT.model_copy(update={"seed": 1}))
    assert torch.equal(weights_of(first), weights_of(other)) == (family in ("logistic", "mass_mean"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_of_weight_zero_has_no_say(family: str) -> None:
    data, labels = synthetic(40)
    weights = np.ones(40)
    weights[:20] = 0.0
    options = FitOptions(epochs=8, batch=40, dropout=0.0, parts=2, hidden=8)
    wrong = labels.copy()
    wrong[:20] = ~wrong[:20]
    right, flipped = (fit(family, data, ALL, y, SITES[:1], "misuse", options, weights) for y in (labels, wrong))
    # Standardisation sees every conversation, and it does not depend on labels.
    assert torch.allclose(weights_of(right), weights_of(flipped), rtol=1e-4, atol=1e-5)
    plain = fit(family, data, ALL, wrong, SITES[:1], "misuse", options)
    assert not torch.allclose(weights_of(right), weights_of(plain), rtol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_progress_rises_to_one(family: str) -> None:
    data, labels = synthetic(40)
    told: list[float] = []
    fit(family, data, ALL, labels, SITES[:1], "misuse", SHORT, progress=told.append)
    assert told[-1] == 1.0
    assert all(first < second for first, second in pairwise(told))


def test_a_linear_probe_puts_its_bias_on_one_site_only() -> None:
    data, labels = synthetic(40)
    probe = fit("swim", data, ALL, labels, SITES, "misuse", SHORT)
    assert [bool(probe.maps[site].bias.any()) for site in SITES] == [True, False, False]


def test_mass_mean_is_half_way_between_the_class_means_at_zero() -> None:
    data, labels = synthetic(40)
    rows = TrainingSet.of(data, ALL, labels, SITES[:1], None)
    probe = fit("mass_mean", data, ALL, labels, SITES[:1], "misuse", SHORT)
    means = rows.conversation_means()
    logits = means @ probe.maps[SITES[0]].weight[:, 0].double().numpy() + float(probe.maps[SITES[0]].bias)
    positive, negative = logits[labels].mean(), logits[~labels].mean()
    assert positive == pytest.approx(-negative, rel=1e-4)
    # The log odds of two normals of one variance have class means of plus and minus half that variance.
    within = np.mean(np.concatenate((logits[labels] - positive, logits[~labels] - negative)) ** 2)
    assert positive - negative == pytest.approx(within, rel=1e-4)


def test_mass_mean_refuses_classes_without_variance() -> None:
    data, labels = synthetic(40)
    with pytest.raises(DataError, match="mass_mean needs class means that differ"):
        fit("mass_mean", data, np.array([0, 1]), labels, SITES[:1], "misuse", SHORT)


def test_an_unknown_family_names_the_nearest() -> None:
    data, labels = synthetic(40)
    with pytest.raises(ConfigError, match="unknown probe family 'atention'; did you mean 'attention'"):
        fit("atention", data, ALL, labels, SITES[:1], "misuse", SHORT)


def test_mlp_refuses_two_sites() -> None:
    data, labels = synthetic(40)
    with pytest.raises(ConfigError, match=r"mlp reads one site, got 2: resid\.1, resid\.3"):
        fit("mlp", data, ALL, labels, SITES[:2], "misuse", SHORT)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_class_is_an_error(family: str) -> None:
    data, labels = synthetic(40)
    with pytest.raises(DataError, match="20 positives and 0 negatives to train on"):
        fit(family, data, np.arange(0, 40, 2), labels, SITES[:1], "misuse", SHORT)


def test_a_class_of_weight_zero_is_an_error() -> None:
    data, labels = synthetic(40)
    with pytest.raises(DataError, match="0 positives and 20 negatives"):
        fit("swim", data, ALL, labels, SITES[:1], "misuse", SHORT, weights=(~labels).astype(np.float64))


def test_default_options_are_the_measured_recipe() -> None:
    options = FitOptions()
    assert (options.epochs, options.batch, options.parts) == (3, 64, 4)
    assert math.isclose(options.learning_rate, 0.01)
