"""ProdLDA: a topic model whose topics are experts that are multiplied, with an encoder network.

    p(z) = N(z; mu, diag sigma^2)                   a Dirichlet(alpha) prior of theta = softmax(z), by Laplace's method
    p(x | z) = prod_v softmax(B theta)_v^{x_v}      the words of a document, with the topics' weights in B's columns
    q(z | x) = N(z; mu(x), diag sigma^2(x))         by a network of the word counts x

LDA mixes the topics' distributions over words; here their unnormalised logarithms are averaged, so that a topic can
veto a word (Srivastava & Sutton, arXiv:1703.01488, Sec. 4). Without more this finds no topics, for the posterior
collapses onto the prior: the paper's remedy is batch normalisation of the encoder's outputs and of the words' logits,
dropout, and Adam with much momentum (Sec. 3.4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.arguments import whole_number
from pyro_vae.distributions import WordCounts
from pyro_vae.models.full_bayes import BayesianModule
from pyro_vae.models.registration import data_plate, register
from pyro_vae.models.vae import positive_ints

__all__ = ["ProdLDA", "laplace_of_dirichlet"]

_EPSILON, _MOMENTUM = 1e-3, 0.1  # of batch normalisation: the authors', and torch's


class ProdLDA(nn.Module):
    """The topic model ProdLDA with the AVITM inference network (Srivastava & Sutton, arXiv:1703.01488).

    A datum is a document's word counts. Its topic proportions are theta = softmax(z): ``encode(x).mean.softmax(-1)``.
    Train it by Adam with beta_1 = 0.99 and a learning rate of 0.002, as the paper does.

    Args:
        vocab_size: D, words in the vocabulary.
        num_topics: J, topics, at least 2.
        hidden_dims: widths of the encoder's hidden layers, with softplus between them.
        dropout: share of the last hidden layer's units, and of theta's topics, that are left out at a training step,
            from 0 to below 1. (The authors' code leaves out 0.6.)
        concentration: alpha of the Dirichlet prior, above 0: one number, or one for each topic.
        bayesian: give the topics a prior and a posterior too, as latents that all documents share (full variational
            Bayes: see :func:`pyro_vae.bayesian`), beside the networks' weights, which are parameters.
        topic_scale: s of the topics' prior N(0, s^2) on every weight B_vk.
        num_data: N, how many documents the bound is of where topics are latent; None for :func:`pyro_vae.fit` to fill
            in.

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> lda = ProdLDA(vocab_size=6, num_topics=2, hidden_dims=(8,))
        >>> x = torch.tensor([[2.0, 0, 1, 0, 0, 3]])
        >>> lda.encode(x).mean.shape, lda.decode(torch.zeros(4, 1, 2)).log_prob(x).shape, lda.topics.shape
        (torch.Size([1, 2]), torch.Size([4, 1]), torch.Size([2, 6]))
        >>> lda.sample(3, num_words=10).sum(-1)
        tensor([10., 10., 10.])
    """

    prior_loc: Tensor
    prior_scale: Tensor

    def __init__(
        self,
        vocab_size: int,
        num_topics: int = 50,
        hidden_dims: Sequence[int] = (100, 100),
        dropout: float = 0.2,
        concentration: float | Sequence[float] = 1.0,
        bayesian: bool = False,
        topic_scale: float = 1.0,
        num_data: int | None = None,
    ) -> None:
        super().__init__()
        self.bayesian, self.topic_scale = bayesian, topic_scale
        self.num_data = None if num_data is None else whole_number("num_data", num_data)
        self.vocab_size = whole_number("vocab_size", vocab_size)
        self.num_topics = whole_number("num_topics", num_topics, least=2)
        self.hidden_dims = positive_ints("hidden_dims", hidden_dims)
        self.dropout = _share_left_out(dropout)
        self.concentration = _concentration(concentration, self.num_topics)
        alpha = torch.as_tensor(self.concentration, dtype=torch.get_default_dtype()).expand(self.num_topics)
        loc, scale = laplace_of_dirichlet(alpha)
        self.register_buffer("prior_loc", loc)
        self.register_buffer("prior_scale", scale)
        widths = (self.vocab_size, *self.hidden_dims)
        layers = [(nn.Linear(wide, narrow), nn.Softplus()) for wide, narrow in itertools.pairwise(widths)]
        self.encoder = nn.Sequential(*(part for layer in layers for part in layer), nn.Dropout(self.dropout))
        self.encoder_loc = _Normalised(nn.Linear(widths[-1], self.num_topics, bias=False))
        self.encoder_log_variance = _Normalised(nn.Linear(widths[-1], self.num_topics, bias=False))
        self.theta_dropout = nn.Dropout(self.dropout)
        self.topic_words: nn.Module = nn.Linear(self.num_topics, self.vocab_size, bias=False)
        self.word_norm = _BatchNorm(self.vocab_size)
        self._initialise()
        if bayesian:
            self.topic_words = BayesianModule(self.topic_words, topic_scale, name="topics")

    def _initialise(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """(D,)."""
        return (self.vocab_size,)

    @property
    def data_range(self) -> tuple[float, float]:
        """Counts: from 0 on."""
        return 0.0, math.inf

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that build this architecture again: ``ProdLDA(**lda.config)``."""
        names = ["vocab_size", "num_topics", "hidden_dims", "dropout", "concentration"]
        if self.bayesian:
            names += ["bayesian", "topic_scale", "num_data"]
        return {name: getattr(self, name) for name in names}

    @property
    def topics(self) -> Tensor:
        """Weights of the words in each topic, (J, D): unnormalised log probabilities, before batch normalisation.

        Of latent topics, the posterior means.
        """
        return next(self._mean_topics.parameters()).detach().T

    @property
    def _mean_topics(self) -> nn.Module:
        return self.topic_words.module if isinstance(self.topic_words, BayesianModule) else self.topic_words

    def model(self, x: Tensor) -> None:
        """p(x, z) of a minibatch of counts x (M, D): Pyro sites "z" and "x" in the plate "data"."""
        register(self)
        topics = self.topic_words.model() if isinstance(self.topic_words, BayesianModule) else self.topic_words
        with data_plate(x, self.num_data if self.bayesian else None):
            z = pyro.sample("z", self._prior())
            pyro.sample("x", self._likelihood(topics, z, x.sum(-1)), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) of a minibatch of counts x (M, D): Pyro site "z" in the plate "data"."""
        register(self)
        if isinstance(self.topic_words, BayesianModule):
            self.topic_words.guide()
        with data_plate(x, self.num_data if self.bayesian else None):
            pyro.sample("z", self.encode(x))

    def encode(self, x: Tensor) -> dist.Distribution:
        """q(z | x): batch shape (...,), event shape (J,).

        Args:
            x: counts, (..., D).
        """
        hidden = self.encoder(x)
        return dist.Normal(self.encoder_loc(hidden), (0.5 * self.encoder_log_variance(hidden)).exp()).to_event(1)

    def decode(self, z: Tensor, total_count: Tensor | int = 1) -> WordCounts:
        """p(x | z): batch shape (...,), event shape (D,); of latent topics, at their posterior means.

        Args:
            z: latents, (..., J).
            total_count: words of each document, for draws of them; the density does not depend on it.
        """
        return self._likelihood(self._mean_topics, z, total_count)

    def _likelihood(self, topics: Callable[[Tensor], Any], z: Tensor, total_count: Tensor | int) -> WordCounts:
        theta = self.theta_dropout(z.softmax(-1))
        return WordCounts(self.word_norm(topics(theta)), total_count)

    @torch.no_grad()
    def sample(self, n: int, *, num_words: int = 100, mean: bool = False) -> Tensor:
        """Draw n documents from the model: z from the prior, then words from p(x | z), of latent topics drawn for each.

        Args:
            n: how many.
            num_words: words of each.
            mean: give E[x | z] instead of a draw of x.

        Returns:
            Counts (n, D).
        """
        training = self.training
        self.eval()  # a document of its own, not one of a batch
        topics = self.topic_words.each if isinstance(self.topic_words, BayesianModule) else self.topic_words
        likelihood = self._likelihood(topics, self._prior().sample((n,)), whole_number("num_words", num_words, least=0))
        self.train(training)
        return likelihood.mean if mean else likelihood.sample()

    def top_words(self, vocab: Sequence[str], n: int = 10) -> list[list[str]]:
        """The n words of greatest weight in each topic, greatest first.

        Args:
            vocab: the D words.
            n: how many, from 1 to D.
        """
        if len(vocab) != self.vocab_size:
            raise ValueError(f"vocab: expected {self.vocab_size} words, got {len(vocab)}")
        best = self.topics.topk(whole_number("n", n, most=self.vocab_size), dim=-1).indices
        return [[vocab[word] for word in topic] for topic in best.tolist()]

    def _prior(self) -> dist.Distribution:
        return dist.Normal(self.prior_loc, self.prior_scale).to_event(1)


def laplace_of_dirichlet(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of z where theta = softmax(z) ~ Dirichlet(alpha), by Laplace's method.

        mu_k = log alpha_k - 1/J sum_j log alpha_j
        sigma_k^2 = 1/alpha_k (1 - 2/J) + 1/J^2 sum_j 1/alpha_j

    Args:
        alpha: concentrations, (J,), above 0.

    Returns:
        Mean and standard deviation, each (J,): those of the density of z at its mode, where correlations are dropped
        (MacKay 1998; Hennig et al. 2012; Srivastava & Sutton, arXiv:1703.01488, Sec. 3.2).

    Example:
        >>> loc, scale = laplace_of_dirichlet(torch.ones(50))
        >>> loc.abs().max().item(), round(scale[0].item() ** 2, 4)
        (0.0, 0.98)
    """
    count = len(alpha)
    log_alpha, inverse = alpha.log(), alpha.reciprocal()
    variance = inverse * (1 - 2 / count) + inverse.sum() / count**2
    return log_alpha - log_alpha.mean(), variance.sqrt()


class _BatchNorm(nn.Module):
    """Batch normalisation with an offset and without a scale, over all but the last dimension, particles too.

    The running statistics, by which evaluation normalises, are the mean over batches until these are ten, and weigh
    the newest by a tenth from then on. A single row has no variance: it is normalised as in evaluation.
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        mean, variance = self.running_mean, self.running_var
        if self.training and len(rows) > 1:
            variance, mean = torch.var_mean(rows, 0, correction=0)
            self._follow(mean.detach(), variance.detach() * (len(rows) / (len(rows) - 1)))
        return (x - mean) * (variance + _EPSILON).rsqrt() + self.offset

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        # In operations of their own: torch's does not say that it writes, and a recorded step may leave it out.
        self.batches.add_(1)
        newest = self.batches.reciprocal().clamp(min=_MOMENTUM)
        self.running_mean.lerp_(mean, newest)
        self.running_var.lerp_(variance, newest)


class _Normalised(nn.Sequential):
    """A linear map and batch normalisation, which makes a bias of the map idle."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, _BatchNorm(linear.out_features))


def _share_left_out(dropout: float) -> float:
    if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise ValueError(f"dropout: expected a number from 0 to below 1, got {dropout!r}")
    return float(dropout)


def _concentration(given: float | Sequence[float], num_topics: int) -> float | tuple[float, ...]:
    one = isinstance(given, (int, float))
    values = (given,) if isinstance(given, (int, float)) else tuple(given)
    if not (one or len(values) == num_topics) or not all(0 < value < math.inf for value in values):
        raise ValueError(
            f"concentration: expected a positive number, or one for each of {num_topics} topics, got {given!r}"
        )
    return float(values[0]) if one else tuple(map(float, values))
