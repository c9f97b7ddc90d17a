"""Models by the options of the command line: which are whose, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_vae.arguments import one_of

if TYPE_CHECKING:
    from pyro_vae.data import Dataset

__all__ = ["MODEL_OPTIONS", "make_model", "require_own_options", "whole_numbers"]

_PRIOR_OPTIONS = {"num_components": ("mixture", "vamp"), "pseudo_inputs": ("vamp",)}  # and of which priors they are
_NETWORK_OPTIONS = ("hidden_dims", "likelihood", "activation", "network", "channels", "prior", *_PRIOR_OPTIONS)
_WEIGHTS_OPTIONS = ("bayesian", "local_reparameterization", "learn_prior")
MODEL_OPTIONS = {
    "vae": (*_NETWORK_OPTIONS, "latent_dim", "init", "posterior", *_WEIGHTS_OPTIONS),
    "hierarchical": (*_NETWORK_OPTIONS, "latent_dims", "guide"),
    "deep-markov": (
        *("latent_dim", "transition_dim", "emission_dim", "rnn_dim", "guide", "emission", "cell", "num_flows"),
        "missing",
    ),
}


def make_model(data: Dataset, options: Mapping[str, Any], named: bool) -> Any:
    """A new model of the kind and with the sizes that the options say, for data.

    Args:
        data: what it will be trained on.
        options: of the command line, by name.
        named: whether the user said which kind of model.

    Raises:
        ValueError: an option is out of its range or for another model, or the data are not for such a model.
    """
    weights = _weights(options)
    if options["model"] == "deep-markov":
        return _deep_markov(data, options)
    _require_no_sequences(data, named)
    made = _vae(data, options, weights) if options["model"] == "vae" else _hierarchical(data, options)
    if options["pseudo_inputs"] == "data":
        made.prior.begin_at(data.train)
    return made


def whole_numbers(texts: list[str], flag: str = "--hidden-dims", such_as: str = "500 or 500,200") -> tuple[int, ...]:
    """The numbers of an option that may be repeated, and whose values are lists."""
    text = ",".join(texts)
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"{flag}: expected whole numbers such as {such_as}, got {text!r}") from None


def require_own_options(model: str, given: Set[str]) -> None:
    """Refuse what is for another model."""
    own = MODEL_OPTIONS[one_of("--model", model, MODEL_OPTIONS)]
    for name in sorted(given & {name for names in MODEL_OPTIONS.values() for name in names} - set(own)):
        others = " or ".join(other for other, names in MODEL_OPTIONS.items() if name in names)
        raise ValueError(f"--{name.replace('_', '-')} is for --model {others}, got --model {model}")


def _require_no_sequences(data: Dataset, named: bool) -> None:
    if data.train_lengths is not None and not named:
        raise ValueError(f"{data.name} holds sequences: expected --model deep-markov, for the default is --model vae")


def _vae(data: Dataset, options: Mapping[str, Any], weights: Mapping[str, Any]) -> Any:
    import pyro_vae as pv

    latent_dim = 20 if options["latent_dim"] is None else options["latent_dim"]
    own = {name: options[name] for name in ("init", "posterior")}
    return pv.VAE(latent_dim=latent_dim, **_network(data, options), **own, **weights)


def _hierarchical(data: Dataset, options: Mapping[str, Any]) -> Any:
    import pyro_vae as pv

    guide, dims = options["guide"] or "bottom-up", whole_numbers(options["latent_dims"])
    return pv.HierarchicalVAE(latent_dims=dims, guide=guide, **_network(data, options))


def _network(data: Dataset, options: Mapping[str, Any]) -> dict[str, Any]:
    """What networks and prior are made with, of data that are no sequences."""
    sizes = {name: whole_numbers(options[name]) for name in ("hidden_dims", "channels")}
    named = {name: options[name] for name in ("likelihood", "activation", "network")}
    return {"data_shape": tuple(data.train.shape[1:]), **sizes, **named, "prior": _prior(options)}


def _prior(options: Mapping[str, Any]) -> str:
    """The prior's name, with the number of components that was given; an option of another prior is an error."""
    prior, count = options["prior"], options["num_components"]
    for name, priors in _PRIOR_OPTIONS.items():
        if options[name] is not None and prior.partition(":")[0] not in priors:
            raise ValueError(f"--{name.replace('_', '-')} is for --prior {' or '.join(priors)}, got --prior {prior}")
    one_of("--pseudo-inputs", options["pseudo_inputs"] or "random", ("random", "data"))
    if count is not None and ":" in prior:
        raise ValueError(f"--num-components: expected none beside --prior {prior}, got {count}")
    return prior if count is None else f"{prior}:{count}"


def _deep_markov(data: Dataset, options: Mapping[str, Any]) -> Any:
    """A deep Markov model with the options that were given, for sequences.

    Raises:
        ValueError: the data are no sequences.
    """
    import pyro_vae as pv
    from pyro_vae.data import DATASETS

    shape = tuple(data.train.shape)
    named = data.train_lengths is None and (data.name in DATASETS or Path(data.source).is_dir())
    if named or len(shape) != 3:
        kind = "no sequences, but data" if data.train_lengths is None else "sequences of steps"
        raise ValueError(
            f"--model deep-markov: expected sequences of vectors, (N, T, D), such as jsb-chorales or pendulum; "
            f"{data.name} holds {kind} of shape {shape[1:] if data.train_lengths is None else shape[2:]}"
        )
    names = MODEL_OPTIONS["deep-markov"]
    given = {name: options[name] for name in names if options[name] is not None}
    return pv.DeepMarkovModel(shape[-1], **{"emission": _emission_of(data.train), **given})


def _emission_of(x: Any) -> str:
    """Bernoulli of numbers 0 and 1, else Gaussian."""
    binary = (x == 0) | (x == 1) | x.isnan()
    return "bernoulli" if bool(binary.all()) else "gaussian"


def _weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a VAE for Bayesian weights; none without."""
    which = one_of("--bayesian", options["bayesian"], ("decoder", "all", "none"))
    given = {name: options[name] for name in ("local_reparameterization", "learn_prior")}
    if which == "none":
        if unused := [name for name, value in given.items() if value]:
            raise ValueError(f"--{unused[0].replace('_', '-')} is for --bayesian decoder or all, got --bayesian none")
        return {}
    scale = {} if options.get("prior_scale") is None else {"prior_scale": options["prior_scale"]}
    return given | scale | {"bayesian": True if which == "all" else which}
