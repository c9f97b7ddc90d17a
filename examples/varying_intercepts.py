"""Eight schools: a hierarchical model by six guides and by NUTS, beside its exact posterior.

    python examples/varying_intercepts.py                 some minutes
    python examples/varying_intercepts.py --smoke         a few seconds

Effects of coaching in eight schools with known standard errors (Rubin 1981; Gelman et al., *Bayesian Data Analysis*,
3rd ed., Sec. 5.5):

    mu ~ N(0, 5^2),  tau ~ HalfCauchy(5),  theta_i ~ N(mu, tau^2),  y_i ~ N(theta_i, sigma_i^2)

mu and tau are global latents, theta_i is the school's own. In the non-centred form it is theta_i = mu + tau eta_i with
eta_i ~ N(0, 1), the same model. Given tau everything is Gaussian, so that the posterior and the evidence are integrals
over tau alone, taken here by the trapezoid rule: what is printed as exact. The guides: Gaussians in unconstrained
space, factorised ("mean field") or of full covariance over mu, tau and all schools, and one of full covariance over mu
and tau alone beside the exact p(theta_i | mu, tau, y_i) for each school ("structured").
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import pyro_vae as pv

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)
RATES = ((0.05, 0.4), (0.01, 0.3), (0.002, 0.3))  # learning rate, and the share of the steps

PyroFunction = Callable[[Tensor, Tensor], None]


def globals_of_model() -> tuple[Tensor, Tensor]:
    """Mu and tau, from their priors."""
    mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0), 5.0))
    return mu, pyro.sample("tau", dist.HalfCauchy(torch.tensor(5.0)))


def centred(y: Tensor, sigma: Tensor) -> None:
    """The effects themselves are latent."""
    mu, tau = globals_of_model()
    with pyro.plate("data", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def non_centred(y: Tensor, sigma: Tensor) -> None:
    """What is latent is by how many tau an effect differs from mu."""
    mu, tau = globals_of_model()
    with pyro.plate("data", len(y)):
        eta = pyro.sample("eta", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)


def structured(model: PyroFunction) -> PyroFunction:
    """Full covariance over mu and tau, and p(theta_i | mu, tau, y_i), exact, in either form."""
    auto = AutoMultivariateNormal(poutine.block(model, expose=["mu", "tau"]), init_scale=0.5)

    def guide(y: Tensor, sigma: Tensor) -> None:
        drawn = auto(y, sigma)
        mu, tau = drawn["mu"], drawn["tau"]
        weight = tau**2 / (tau**2 + sigma**2)  # of the datum
        scale = weight.sqrt() * sigma
        with pyro.plate("data", len(y)):
            if model is centred:
                pyro.sample("theta", dist.Normal(mu + weight * (y - mu), scale))
            else:
                pyro.sample("eta", dist.Normal(weight * (y - mu) / tau, scale / tau))

    return guide


GUIDES: dict[str, Callable[[PyroFunction], Any]] = {
    "mean field": lambda model: AutoNormal(model, init_scale=0.5),
    "full covariance": lambda model: AutoMultivariateNormal(model, init_scale=0.5),
    "structured": structured,
}
MODELS: dict[str, PyroFunction] = {"centred": centred, "non-centred": non_centred}


def exact(y: Tensor, sigma: Tensor) -> dict[str, Any]:
    """Log p(y) in nats, and posterior moments of mu, tau and the effects, by quadrature over tau."""
    u = torch.linspace(-12.0, 9.0, 4001)  # log tau
    tau = u.exp()[:, None]
    variance = sigma**2 + tau**2
    precision, mean = (1 / variance).sum(1) + 1 / 25, (y / variance).sum(1)
    mean = mean / precision  # of mu given tau
    log_likelihood = dist.Normal(0.0, variance.sqrt()).log_prob(y).sum(1)
    log_likelihood = log_likelihood - 0.5 * (25 * precision).log() + 0.5 * precision * mean**2
    log_joint = log_likelihood + dist.HalfCauchy(5.0).log_prob(tau[:, 0]) + u + (u[1] - u[0]).log()
    weight = log_joint.softmax(0)[:, None]
    shrink = tau**2 / variance
    theta = shrink * y + (1 - shrink) * mean[:, None]
    spread = shrink * sigma**2 + (1 - shrink) ** 2 / precision[:, None]
    first = torch.cat([mean[:, None], tau, theta], 1)
    second = first**2 + torch.cat([1 / precision[:, None], 0 * tau, spread], 1)
    means = (weight * first).sum(0)
    return {
        "log p": float(log_joint.logsumexp(0)),
        "mean": means.tolist(),
        "sd": ((weight * second).sum(0) - means**2).sqrt().tolist(),
    }


def train(program: pv.Program, data: tuple[Tensor, Tensor], num_steps: int, seed: int) -> None:
    """AEVB with all schools in each step, and a learning rate that falls."""
    for rate, share in RATES:
        pv.fit(
            program,
            data,
            objective=pv.SGVB(num_particles=16),
            optimizer="adam",
            learning_rate=rate,
            batch_size=len(data[0]),
            epochs=max(1, int(share * num_steps)),
            evaluate_every=10**9,
            seed=seed,
        )


def effects_of(draws: dict[str, Tensor]) -> Tensor:
    """Draws (S, 10) of mu, tau and the eight effects."""
    mu, tau = draws["mu"].reshape(-1, 1), draws["tau"].reshape(-1, 1)  # with or without the plate's dimension
    theta = draws["theta"] if "theta" in draws else mu + tau * draws["eta"]
    return torch.cat([mu, tau, theta], 1)


def by_nuts(model: PyroFunction, data: tuple[Tensor, Tensor], num_samples: int, seed: int) -> dict[str, Any]:
    """One chain, after half as many of warm-up: moments with Monte Carlo errors of the means, and diagnostics."""
    pyro.set_rng_seed(seed)
    kernel = NUTS(model, target_accept_prob=0.9)
    chain = MCMC(kernel, num_samples=num_samples, warmup_steps=max(10, num_samples // 2), disable_progbar=True)
    chain.run(*data)
    draws, diagnostics = effects_of(chain.get_samples()), chain.diagnostics()
    effective = pyro.ops.stats.effective_sample_size(draws.unsqueeze(0), chain_dim=0, sample_dim=1)
    return {
        "mean": draws.mean(0).tolist(),
        "sd": draws.std(0).tolist(),
        "error of the mean": (draws.std(0) / effective.sqrt()).tolist(),
        "r_hat": float(pyro.ops.stats.split_gelman_rubin(draws.unsqueeze(0), chain_dim=0, sample_dim=1).max()),
        "divergences": len(diagnostics["divergences"]["chain 0"]),
    }


@torch.no_grad()
def by_guide(program: pv.Program, data: tuple[Tensor, Tensor], num_draws: int) -> dict[str, Any]:
    """Moments under the guide, the bound, and log p(y) by importance sampling, all from the same draws, in nats.

    The log weights of all data are summed, with those of mu and tau: one weight for each draw of everything, as
    ``pv.log_marginal(..., of="dataset")`` does, which does not give the draws.
    """
    weights = pv.log_weights(program.model, program.guide, data, num_particles=num_draws)
    assert weights.log_w_global is not None
    log_w = weights.log_w.sum(1) + weights.log_w_global
    ratio = (log_w - log_w.max()).exp()
    draws = effects_of(weights.latents)
    return {
        "mean": draws.mean(0).tolist(),
        "sd": draws.std(0).tolist(),
        "bound": float(log_w.mean()),
        "log p": float(log_w.logsumexp(0)) - math.log(num_draws),
        "mc_error": float(ratio.std() / ratio.mean()) / num_draws**0.5,
    }


def line(name: str, found: dict[str, Any], more: str = "") -> None:
    """Print mu, tau and the first school's effect."""
    moments = "  ".join(f"{m:6.2f} ({s:.2f})" for m, s in zip(found["mean"][:3], found["sd"][:3], strict=True))
    print(f"{name:32s} {moments}  {more}", flush=True)


def main() -> None:
    """The exact answer, three guides of both forms, and NUTS on both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nuts-samples", type=int, default=1_000, help="draws after warm-up")
    parser.add_argument("--num-steps", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    parser.add_argument("--smoke", action="store_true", help="a few steps and draws")
    args = parser.parse_args()
    samples, steps, particles = (30, 30, 1000) if args.smoke else (args.nuts_samples, args.num_steps, 100_000)
    torch.set_default_dtype(torch.float64)
    data = torch.tensor(EFFECTS), torch.tensor(ERRORS)

    table = {"exact": exact(*data)}
    print(f"{'':32s} mu, tau and the first effect: posterior mean (standard deviation)")
    line("exact", table["exact"], f"log p(y) {table['exact']['log p']:.3f} nats")
    for form, model in MODELS.items():
        for name, make in GUIDES.items():
            torch.manual_seed(args.seed)
            program = pv.Program(model, make(model))
            train(program, data, steps, args.seed)
            table[f"{name}, {form}"] = found = by_guide(program, data, particles)
            more = f"bound {found['bound']:.3f} nats; log p(y) {found['log p']:.3f} ± {found['mc_error']:.3f}"
            line(f"{name}, {form}", found, more)
    for form, model in MODELS.items():
        table[f"NUTS, {form}"] = found = by_nuts(model, data, samples, args.seed)
        errors = ", ".join(f"{error:.2f}" for error in found["error of the mean"][:3])
        more = f"errors {errors}; {found['divergences']} divergences, R-hat {found['r_hat']:.3f}"
        line(f"NUTS, {form}", found, more)
    if args.out is not None:
        args.out.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
