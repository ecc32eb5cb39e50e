import numpy as np
import numpy.typing as npt
import pytest
import torch

from spider_sense.activations import ActivationSet
from spider_sense.errors import ConfigError, DataError
from spider_sense.training.features import Packing, TrainingSet, fold, moments
from spider_sense.types import Site

SITES = (Site(1, "resid"), Site(2, "resid"), Site(4, "resid"))
LABELS = np.array([True, False, True, False])


def activations() -> ActivationSet:
    starts = np.array([0, 3, 4, 9, 11])
    hidden = torch.randn(11, 3, 5, generator=torch.Generator().manual_seed(0)).half()
    return ActivationSet(
        sites=SITES,
        ids=("a", "b", "c", "d"),
        hidden=hidden,
        starts=starts,
        prompt_rows=np.array([3, 1, 2, 2]),
        skips=np.zeros(4, dtype=np.int64),
        tail=1,
    )


def chosen(
    train: tuple[int, ...] = (0, 1, 2, 3),
    sites: tuple[Site, ...] = SITES,
    labels: npt.NDArray[np.bool_] = LABELS,
    weights: npt.NDArray[np.float64] | None = None,
) -> TrainingSet:
    return TrainingSet.of(activations(), np.array(train, dtype=np.int64), labels, sites, weights)


def test_packing_lists_rows_conversation_by_conversation() -> None:
    packing = Packing.of(np.array([7, 2]), np.array([2, 3]))
    assert packing.row_R.tolist() == [7, 8, 2, 3, 4]
    assert packing.owner_R.tolist() == [0, 0, 1, 1, 1]
    assert packing.column_R.tolist() == [0, 1, 0, 1, 2]
    assert packing.valid_Bn.tolist() == [[True, True, False], [True, True, True]]


def test_padding_is_left_aligned_and_differentiable() -> None:
    x = torch.arange(1.0, 6.0)[:, None].requires_grad_()
    padded = Packing.of(np.array([7, 2]), np.array([2, 3])).pad(x)
    assert padded[..., 0].tolist() == [[1, 2, 0], [3, 4, 5]]
    (gradient,) = torch.autograd.grad(padded[1].sum(), x)
    assert gradient[:, 0].tolist() == [0, 0, 1, 1, 1]


def test_gather_sets_the_chosen_sites_side_by_side_in_their_order() -> None:
    data, rows = activations(), torch.tensor([10, 0, 4])
    features = chosen(sites=(SITES[2], SITES[0])).gather(rows)
    assert torch.equal(features, torch.cat((data.hidden[rows, 2], data.hidden[rows, 0]), 1).float())


def test_conversation_means_read_the_prompt_only() -> None:
    data = activations()
    means = chosen(train=(2, 1)).conversation_means()
    expected = data.hidden.double().flatten(1)
    assert np.allclose(means[0], expected[4:6].mean(0), atol=1e-6)
    assert np.allclose(means[1], expected[3], atol=1e-6)


def test_more_conversations_than_a_chunk_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = chosen().conversation_means()
    monkeypatch.setattr("spider_sense.training.features.CHUNK", 3)
    assert np.array_equal(chosen().conversation_means(), whole)


def test_token_moments_see_the_training_rows_and_no_others() -> None:
    mean, deviation = chosen(train=(0, 3)).token_moments(torch.Generator().manual_seed(0))
    rows = activations().hidden.double().flatten(1)[[0, 1, 2, 9, 10]]
    assert torch.allclose(mean.double(), rows.mean(0), atol=1e-6)
    assert torch.allclose(deviation.double(), rows.std(0, correction=0) + 1e-3, atol=1e-6)


def test_folded_weights_on_raw_features_equal_weights_on_standardised_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (4, 2), (2,)))
    mean, deviation = (torch.from_numpy(item) for item in moments(x.double().numpy()))
    raw, offset = fold(weight, bias, mean, deviation)
    assert torch.allclose(x.double() @ raw + offset, (x - mean) / deviation @ weight.double() + bias, atol=1e-6)


def test_weights_are_scaled_to_mean_one_over_the_training_conversations() -> None:
    rows = chosen(train=(0, 1, 3), weights=np.array([1.0, 2.0, 50.0, 3.0]))
    assert rows.weight_N.tolist() == [0.5, 1.0, 1.5]


def test_sites_must_be_captured_and_named_once() -> None:
    with pytest.raises(ConfigError, match=r"site resid\.3 was not captured; .*Known: resid\.1, resid\.2, resid\.4"):
        chosen(sites=(Site(3, "resid"),))
    with pytest.raises(ConfigError, match="sites to read: none"):
        chosen(sites=())
    with pytest.raises(ConfigError, match=r"resid\.1, resid\.1; name at least one, and each once"):
        chosen(sites=SITES[:1] * 2)


def test_labels_and_weights_must_fit() -> None:
    with pytest.raises(DataError, match=r"labels of shape \(3,\)"):
        chosen(labels=LABELS[:3])
    with pytest.raises(DataError, match=r"weights of shape \(2,\)"):
        chosen(weights=np.ones(2))
    with pytest.raises(DataError, match="negative or not finite"):
        chosen(weights=np.array([1.0, 1.0, -1.0, 1.0]))
    with pytest.raises(DataError, match="0 positives and 0 negatives"):
        chosen(train=())


def test_a_conversation_without_a_prompt_row_is_an_error_that_names_it() -> None:
    data = activations()
    data.prompt_rows[1] = 0
    with pytest.raises(DataError, match="1 conversations have no prompt row, the first is 'b'"):
        TrainingSet.of(data, np.arange(4), LABELS, SITES, None)
