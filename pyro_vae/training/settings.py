"""The settings of a run, validated before any work is done."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_vae.arguments import one_of, positive_number, whole_number
from pyro_vae.training.precision import PRECISIONS

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """The settings that a resumed run must share, the budget apart; what they mean is in :func:`pyro_vae.fit`.

    Raises:
        ValueError: one of them is out of its range; says what was expected.
    """

    optimizer: str
    learning_rate: float | None
    batch_size: int
    num_samples: int | None
    epochs: int | None
    binarize: str | None
    seed: int
    evaluate_every: int | None
    evaluation_size: int
    checkpoint_every: int | None
    prior_scale: float | None
    kl_warmup: int | None
    max_grad_norm: float | None
    patience: int | None
    trained: str = "all"
    precision: str = "full"
    learning_rate_schedule: float | str | None = None
    schedule_every: str = "epoch"
    ema_decay: float | None = None
    free_bits: float | None = None
    kl_by_site: bool = False
    trim_padding: bool = False

    def __post_init__(self) -> None:
        if (self.num_samples is None) == (self.epochs is None):
            raise ValueError(
                "expected a budget as either num_samples or epochs, "
                f"got num_samples={self.num_samples} and epochs={self.epochs}"
            )
        optional = ("num_samples", "epochs", "evaluate_every", "checkpoint_every", "kl_warmup", "patience")
        for name in ("batch_size", "evaluation_size", *optional):
            value = getattr(self, name)
            if value is not None or name not in optional:
                object.__setattr__(self, name, whole_number(name, value))
        one_of("trained", self.trained, ("all", "guide"))
        one_of("precision", self.precision, PRECISIONS)
        one_of("schedule_every", self.schedule_every, ("epoch", "step"))
        if self.ema_decay is not None:
            decay = positive_number("ema_decay", self.ema_decay)
            if decay >= 1:
                raise ValueError(f"ema_decay: expected a number above 0 and below 1, got {self.ema_decay!r}")
            object.__setattr__(self, "ema_decay", decay)
        object.__setattr__(self, "seed", whole_number("seed", self.seed, 0, 2**32 - 1))
        for name in ("learning_rate", "prior_scale", "max_grad_norm", "free_bits"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, positive_number(name, value))
