"""The recipes against their formulas."""

import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch

from nest.scores import recipe, z_scores
from spider_sense.errors import ConfigError, MissingExtraError

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@pytest.fixture
def data() -> tuple[Floats, Bools]:
    generator = np.random.default_rng(0)
    label_N = np.arange(30) < 12
    features_NF = generator.normal(size=(30, 6)).astype(np.float32)
    features_NF[label_N, 2] += 1.5
    return features_NF, label_N


def weights(name: str, data: tuple[Floats, Bools], c: float = 0.1, epochs: int = 50) -> Floats:
    return recipe(name, c=c, epochs=epochs, seed=3).weigh(*data)


def test_the_probe_is_where_the_balanced_penalised_loss_is_flat(data: tuple[Floats, Bools]) -> None:
    c, (features_NF, label_N) = 0.1, data
    weight_F = torch.tensor(weights("probe", data, c), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    x_NF, y_N = torch.from_numpy(features_NF).double(), torch.from_numpy(label_N).double()
    share_N = torch.where(y_N > 0, 30 / (2 * 12), 30 / (2 * 18))

    def loss() -> torch.Tensor:
        logit_N = x_NF @ weight_F + bias
        entropy_N = torch.nn.functional.binary_cross_entropy_with_logits(logit_N, y_N, reduction="none")
        return c * (share_N * entropy_N).sum() + 0.5 * weight_F.square().sum()

    # The intercept is not penalised, so it is free to settle for given weights.
    solver = torch.optim.LBFGS([bias], max_iter=100, tolerance_grad=1e-10)

    def closure() -> torch.Tensor:
        solver.zero_grad()
        value = loss()
        value.backward(inputs=[bias])
        return value

    solver.step(closure)
    (gradient_F,) = torch.autograd.grad(loss(), weight_F)
    assert gradient_F.abs().max() < 1e-3


def test_contrast_is_the_difference_of_means(data: tuple[Floats, Bools]) -> None:
    features_NF, label_N = data
    expected_F = [column[:12].mean() - column[12:].mean() for column in features_NF.T]
    np.testing.assert_allclose(weights("contrast", data), expected_F, rtol=1e-4, atol=1e-6)
    assert label_N[:12].all()


def test_effect_size_is_cohens_d(data: tuple[Floats, Bools]) -> None:
    data[0][:, 4] = 1.0
    found_F = weights("effect_size", data)
    for row, column in enumerate(data[0].T.astype(np.float64)):
        harmful, benign = column[:12], column[12:]
        pooled = np.sqrt((11 * harmful.var(ddof=1) + 17 * benign.var(ddof=1)) / 28)
        expected = 0.0 if row == 4 else (harmful.mean() - benign.mean()) / pooled
        assert found_F[row] == pytest.approx(expected, rel=1e-4)


def test_raw_is_what_adam_makes_of_a_linear_layer(data: tuple[Floats, Bools]) -> None:
    features, target = torch.from_numpy(data[0]), torch.from_numpy(data[1]).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layer = torch.nn.Linear(6, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, weight_decay=1e-3)
    for _ in range(50):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(layer(features)[:, 0], target).backward()
        optimizer.step()
    np.testing.assert_allclose(weights("raw", data), layer.weight.detach()[0].numpy(), rtol=1e-4, atol=1e-6)


def test_recipes_know_their_features() -> None:
    made = {name: recipe(name, c=1.0, epochs=1, seed=0) for name in ("probe", "contrast", "effect_size", "raw")}
    assert [name for name, one in made.items() if one.standardise] == ["probe", "effect_size"]
    assert [name for name, one in made.items() if not one.hold_out or one.pool == "raw"] == ["raw"]


def test_z_scores() -> None:
    scores = z_scores(np.array([1.0, 2.0, 3.0, 6.0], dtype=np.float32))
    np.testing.assert_allclose(scores, (np.array([1, 2, 3, 6]) - 3) / np.sqrt(3.5), rtol=1e-6)
    assert not z_scores(np.full(5, 2.0, dtype=np.float32)).any()


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'prob'; did you mean 'probe'"):
        recipe("prob", c=1.0, epochs=1, seed=0)


def test_the_probe_needs_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingExtraError, match="scikit-learn is not installed"):
        recipe("probe", c=1.0, epochs=1, seed=0)
