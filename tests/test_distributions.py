"""Word counts: their density against products written out, their draws against the multinomial enumerated."""

import itertools
import math

import pytest
import torch

from pyro_vae import distributions
from pyro_vae.distributions import WordCounts
from tests.statistics import assert_mean_close


def close(left, right, atol=1e-12):
    torch.testing.assert_close(left, right, rtol=0, atol=atol)


def counts_of(total, width):
    """Every vector of counts of so many words."""
    every = [c for c in itertools.product(range(total + 1), repeat=width) if sum(c) == total]
    return torch.tensor(every, dtype=torch.get_default_dtype())


def orders_of(counts):
    """In how many orders the words can stand: n! / prod x_v!."""
    factorials = [math.prod(math.factorial(int(x)) for x in row) for row in counts.tolist()]
    return torch.tensor([math.factorial(int(row.sum())) / f for row, f in zip(counts, factorials, strict=True)])


# Density --------------------------------------------------------------------------------------------------------------


def test_density_is_the_product_of_the_words_probabilities():
    logits = torch.randn(5, 4)
    words = torch.tensor([[0, 0, 3], [1, 2, 3], [2, 2, 2], [0, 1, 0], [3, 1, 1]])  # documents of three words
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = p.gather(1, words).log().sum(-1)
    close(WordCounts(logits).log_prob(torch.nn.functional.one_hot(words, 4).sum(1).double()), expected)


def test_densities_of_all_documents_sum_to_one_and_a_multinomials_do_not():
    logits, counts = torch.randn(3), counts_of(4, 3)
    density = WordCounts(logits, 4).log_prob(counts).exp()
    assert (density * orders_of(counts)).sum().item() == pytest.approx(1.0, abs=1e-12)
    planted = torch.distributions.Multinomial(4, logits=logits).log_prob(counts).exp()
    assert (planted * orders_of(counts)).sum().item() > 1.5


def test_a_document_without_words_has_density_one():
    assert WordCounts(torch.randn(6), 0).log_prob(torch.zeros(6)).item() == 0.0
    assert WordCounts(torch.randn(6), 0).sample().tolist() == [0.0] * 6


def test_density_does_not_depend_on_the_stated_number_of_words():
    logits, x = torch.randn(2, 3), torch.tensor([[1.0, 0, 2], [4, 0, 0]])
    close(WordCounts(logits, 7).log_prob(x), WordCounts(logits, torch.tensor([3, 4])).log_prob(x))


def test_shapes_broadcast():
    logits, count = torch.randn(5, 1, 3), torch.tensor([2, 0, 9, 1])
    words = WordCounts(logits, count)
    assert (words.batch_shape, words.event_shape) == ((5, 4), (3,))
    assert words.log_prob(torch.ones(4, 3)).shape == (5, 4)
    assert words.sample((2,)).shape == words.sample((2,)).shape == (2, 5, 4, 3)
    wide = words.expand((6, 5, 4))
    assert wide.sample().shape == (6, 5, 4, 3)
    close(wide.log_prob(torch.ones(4, 3))[2], words.log_prob(torch.ones(4, 3)))
    close(wide.mean[1], words.total_count[..., None] * words.logits.softmax(-1))


def test_gradient_is_the_residual_of_the_counts():
    logits, x = torch.randn(3, requires_grad=True), torch.tensor([2.0, 0.0, 5.0])
    (gradient,) = torch.autograd.grad(WordCounts(logits).log_prob(x), logits)
    close(gradient, x - 7 * logits.detach().softmax(-1))


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ([[1.0, 2, 3], [0, -1, 0]], "at least 0, got -1 in row 1, word 1"),
        ([[1.0, 2, 0.5]] * 2, "whole numbers of at least 0, got 0.5 in row 0, word 2"),
        ([[1.0, 2, math.nan]], "got nan in row 0, word 2"),
        ([1.0, 2.5, 0.0], "got 2.5, word 1"),
        ([[1.0, 2.0]], r"shape \(..., 3\), got \(1, 2\)"),
    ],
)
def test_what_are_no_counts_is_refused(x, said):
    with pytest.raises(ValueError, match=said):
        WordCounts(torch.zeros(3)).log_prob(torch.tensor(x))
    if "shape" not in said:
        WordCounts(torch.zeros(3), validate_args=False).log_prob(torch.tensor(x))


def test_logits_without_words_are_refused():
    with pytest.raises(ValueError, match="a dimension of words"):
        WordCounts(torch.tensor(0.0))


# Draws ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 13, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_counts_of_the_stated_number_of_words(width, dtype):
    count = torch.tensor([0, 1, 7, 4306])
    x = WordCounts(5 * torch.randn(4, width, dtype=dtype), count).sample((10,))
    assert x.dtype == dtype
    assert x.shape == (10, 4, width)
    assert (x >= 0).all()
    assert torch.equal(x, x.round())
    assert torch.equal(x.sum(-1), count.to(dtype).expand(10, 4))


def frequencies(logits, counts, total, n=40_000):
    """Indicators (n, documents) of which one was drawn, and their probabilities."""
    drawn = WordCounts(logits, total).sample((n,))
    p = (counts * logits.log_softmax(-1)).sum(-1).exp() * orders_of(counts)
    return (drawn[:, None] == counts).all(-1), p


@pytest.mark.parametrize("width", [2, 3, 5])
def test_draws_have_the_multinomials_law(width):
    counts = counts_of(3, width)
    assert_mean_close(*frequencies(torch.randn(width), counts, 3), min_effect=0.015)


@pytest.mark.parametrize(
    "planted",
    [
        lambda left, right: torch.full_like(left, 0.5),
        lambda left, right: right / (left + right),
        lambda left, right: torch.where(right > 0, left, (left > 0).to(left.dtype)),  # of the whole, not of the pair
    ],
)
def test_draws_by_other_shares_are_rejected(monkeypatch, planted):
    monkeypatch.setattr(distributions, "_share", planted)
    found, p = frequencies(torch.tensor([1.0, 0.0, -0.5, 0.4]), counts_of(3, 4), 3)
    with pytest.raises(AssertionError, match="mean"):
        assert_mean_close(found, p, min_effect=0.02)


def test_words_of_no_probability_are_never_drawn():
    logits = torch.tensor([0.0, -math.inf, -math.inf, -math.inf, 0.0, -math.inf, -1e4])
    x = WordCounts(logits, 1000, validate_args=False).sample((50,))
    assert x[:, [1, 2, 3, 5, 6]].sum() == 0
    assert_mean_close(x[:, 0], 500.0, min_effect=30)


def test_moments():
    words = WordCounts(torch.randn(5), 20)
    x = words.sample((20_000,))
    assert_mean_close(x, words.mean, min_effect=0.15)
    assert_mean_close((x - words.mean).square(), words.variance, min_effect=0.5)
