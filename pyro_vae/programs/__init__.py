"""The one bridge from Pyro programs to tensors, and the only part that uses ``pyro.poutine``.

Every objective and every scorer of the package is a small reduction of

    log_w[k, m] = log p(x_m, z_km) - log q(z_km | x_m)          shape (K, M): K particles, M data of a minibatch

and :func:`log_weights` computes it, site by site, for any pair of Pyro functions. A *program* is any object with two
such functions, ``.model`` and ``.guide``; :class:`Program` makes one of two plain functions. What a program must obey:

* data that are independent given the global latents sit in ``pyro.plate("data", ...)``;
* both functions take the same arguments, the observed data among them;
* K particles add one more dimension on the left of all of the program's own, also when K = 1, so z is (K, M, J) and
  code must broadcast over leading dimensions (``z[..., 0]``, not ``z[:, 0]``).

Densities are masked as the program says and summed over every dimension but the particles' and the data plate's, which
are found by their names. The minibatch's scale N / M is kept apart, as :attr:`LogWeights.scale`, since it has no place
inside a log-sum-exp. A ``poutine.scale`` of the program's own is part of its density and stays in it.
"""

from pyro_vae.programs.check import ProgramCheck, check_program
from pyro_vae.programs.dimensions import LatentSite, kl_by_dimension, latent_sites
from pyro_vae.programs.dreams import Dream, dream
from pyro_vae.programs.latent_space import Density, LatentSpace
from pyro_vae.programs.program import (
    HasModelAndGuide,
    Program,
    as_program,
    bind_arguments,
    evaluation_mode,
    guide_of,
    signature_of,
)
from pyro_vae.programs.sequences import SequenceLaws, sequence_laws
from pyro_vae.programs.sites import DATA_PLATE, draws_per_datum, minibatch_scale, same_minibatch
from pyro_vae.programs.weights import (
    LogWeights,
    draw_guide,
    draw_prior,
    guide_parameters,
    log_guide,
    log_weights,
    model_parameters,
)

__all__ = [
    "DATA_PLATE",
    "Density",
    "Dream",
    "HasModelAndGuide",
    "LatentSite",
    "LatentSpace",
    "LogWeights",
    "Program",
    "ProgramCheck",
    "SequenceLaws",
    "as_program",
    "bind_arguments",
    "check_program",
    "draw_guide",
    "draw_prior",
    "draws_per_datum",
    "dream",
    "evaluation_mode",
    "guide_of",
    "guide_parameters",
    "kl_by_dimension",
    "latent_sites",
    "log_guide",
    "log_weights",
    "minibatch_scale",
    "model_parameters",
    "same_minibatch",
    "sequence_laws",
    "signature_of",
]
