"""Learning objectives: each is a ``pyro.infer.ELBO`` and works in ``pyro_vae.fit`` and in ``pyro.infer.SVI`` alike."""

from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.sgvb import SGVB

OBJECTIVES: dict[str, type[Objective]] = {"sgvb": SGVB}

__all__ = ["OBJECTIVES", "SGVB", "Objective"]
