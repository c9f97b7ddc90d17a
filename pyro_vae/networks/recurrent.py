"""Recurrent networks whose cell alone is recorded: see :mod:`pyro_vae.recurrence`.

    tanh, relu   h_t = s(W x_t + b + U h_{t-1})                                     (Elman 1990)
    gru          r, v = sigmoid(...), n = tanh(W_n x_t + b_n + r * (U_n h_{t-1} + c)), h_t = (1 - v) n + v h_{t-1}
                                                                                    (Cho et al., arXiv:1406.1078)
    lstm         i, f, o = sigmoid(...), c_t = f c_{t-1} + i tanh(...), h_t = o tanh(c_t)
                                                                                    (Hochreiter & Schmidhuber 1997)

What depends on the inputs alone is one matrix product for all steps; the loop holds the product with U.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_vae.recurrence import scan

__all__ = ["CELLS", "Recurrent", "reversed_within"]


class _Elman(nn.Module):
    """h_t of h_{t-1}, (..., H), and the inputs' part (..., H)."""

    def __init__(self, hidden_dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.hidden, self.activation = nn.Linear(hidden_dim, hidden_dim, bias=False), activation

    def forward(self, h: Tensor, given: Tensor) -> Tensor:
        """The next state."""
        state: Tensor = self.activation(given + self.hidden(h))
        return state


class _GRU(nn.Module):
    """h_t of h_{t-1}, (..., H), and the inputs' part (..., 3 H)."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_dim, 3 * hidden_dim)

    def forward(self, h: Tensor, given: Tensor) -> Tensor:
        """The next state."""
        (a, b, c), (u, v, w) = given.chunk(3, -1), self.hidden(h).chunk(3, -1)
        new = torch.tanh(c + torch.sigmoid(a + u) * w)
        return new + torch.sigmoid(b + v) * (h - new)


class _LSTM(nn.Module):
    """(h_t, c_t) of (h_{t-1}, c_{t-1}), (..., 2 H), and the inputs' part (..., 4 H)."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden_dim, 4 * hidden_dim, bias=False)

    def forward(self, state: Tensor, given: Tensor) -> Tensor:
        """The next state."""
        h, c = state.chunk(2, -1)
        i, f, o, new = (given + self.hidden(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(new)
        return torch.cat([torch.sigmoid(o) * torch.tanh(c), c], -1)


# A cell of width H, and how many times H its inputs' part is wide.
CELLS: dict[str, Callable[[int], tuple[nn.Module, int]]] = {
    "tanh": lambda hidden_dim: (_Elman(hidden_dim, nn.Tanh()), 1),
    "relu": lambda hidden_dim: (_Elman(hidden_dim, nn.ReLU()), 1),
    "gru": lambda hidden_dim: (_GRU(hidden_dim), 3),
    "lstm": lambda hidden_dim: (_LSTM(hidden_dim), 4),
}


class Recurrent(nn.Module):
    """A recurrent network over sequences, forwards or backwards.

    Args:
        in_dim: size of the last dimension of the input.
        hidden_dim: H.
        cell: "tanh", "relu", "gru" or "lstm".
        backwards: read each sequence from its last step to its first.

    Example:
        >>> rnn = Recurrent(88, 16, backwards=True)
        >>> rnn(torch.zeros(4, 10, 88), lengths=torch.tensor([10, 3, 1, 7])).shape
        torch.Size([4, 10, 16])
    """

    def __init__(self, in_dim: int, hidden_dim: int, cell: str = "tanh", backwards: bool = False) -> None:
        super().__init__()
        self.hidden_dim, self.backwards = hidden_dim, backwards
        self.cell, gates = CELLS[cell](hidden_dim)
        self.inputs = nn.Linear(in_dim, gates * hidden_dim)
        self.start = nn.Parameter(torch.zeros(hidden_dim * (2 if cell == "lstm" else 1)))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What is known at each step from the steps up to it, or, backwards, from it to the sequence's end.

        Args:
            x: (..., T, D).
            lengths: (...), from 1 to T; None for T.

        Returns:
            (..., T, H); past a sequence's length it means nothing.
        """
        if lengths is not None:  # zeros in the padding: whatever is there, 0 * inf would be NaN
            within = torch.arange(x.shape[-2], device=x.device) < lengths[..., None]
            x = torch.where(within[..., None], x, 0.0)
        x = reversed_within(x, lengths) if self.backwards else x
        given = self.inputs(x).movedim(-2, 0)
        start = self.start.expand(*given.shape[1:-1], -1)
        states = scan(self.cell, start, [given]).movedim(0, -2)[..., : self.hidden_dim]
        return reversed_within(states, lengths) if self.backwards else states


def reversed_within(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Sequences (..., T, D) with the steps within their lengths in reverse, and what comes after where it was."""
    if lengths is None:
        return x.flip(-2)
    steps = torch.arange(x.shape[-2], device=x.device)
    place = torch.where(steps < lengths[..., None], lengths[..., None] - 1 - steps, steps)
    return x.gather(-2, place[..., None].expand(x.shape))
