"""Learning objectives: each is a ``pyro.infer.ELBO`` and works in ``pyro_vae.fit`` and in ``pyro.infer.SVI`` alike."""

from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.fivo import FIVO
from pyro_vae.objectives.importance import IWAE, VIMCO, DReG, Renyi
from pyro_vae.objectives.mcem import MCEM
from pyro_vae.objectives.sgvb import SGVB
from pyro_vae.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep

OBJECTIVES: dict[str, type[Objective]] = {
    "sgvb": SGVB,
    "iwae": IWAE,
    "dreg": DReG,
    "renyi": Renyi,
    "vimco": VIMCO,
    "fivo": FIVO,
    "wake-sleep": WakeSleep,
    "reweighted-wake-sleep": ReweightedWakeSleep,
    "mcem": MCEM,
}

__all__ = [
    "FIVO",
    "IWAE",
    "MCEM",
    "OBJECTIVES",
    "SGVB",
    "VIMCO",
    "DReG",
    "Objective",
    "Renyi",
    "ReweightedWakeSleep",
    "WakeSleep",
]
