"""Who may import whom: the picture of the design's section 4, read from the imports."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyro_vae"

# Each file or folder of the package, and what it may import of the package beside itself.
PICTURE: dict[str, set[str]] = {
    "arguments": set(),
    "numerics": set(),
    "networks": {"recurrence"},
    "data": set(),
    "plots": set(),
    "parallel": set(),
    "recurrence": {"numerics", "compile"},
    "distributions": {"numerics", "recurrence"},
    "programs": {"numerics", "distributions"},
    "compile": {"numerics"},
    "hmc": {"numerics", "programs"},
    "smc": {"numerics", "programs", "distributions"},
    "inputs": {"programs", "data"},
    "models": {"networks", "distributions", "programs", "smc", "recurrence"},
    "objectives": {"programs", "hmc", "smc", "numerics"},
    "evaluation": {"objectives", "programs", "hmc", "smc", "compile", "numerics", "inputs", "data"},
    "tasks": {"programs", "hmc", "inputs", "data"},
    "training": {"evaluation", "objectives", "compile", "programs", "inputs", "data", "numerics"},
    "runs": {"models", "objectives", "training", "programs", "inputs", "data"},
}
for _name in ("models", "objectives", "evaluation", "training", "smc"):
    PICTURE[_name].add("arguments")
for _name in ("evaluation", "training"):
    PICTURE[_name].add("parallel")
PICTURE["gallery"] = {"runs", "plots", "inputs", "programs", "data"}
PICTURE["sequence_gallery"] = PICTURE["gallery"] | {"models", "arguments"}
PICTURE["experiments"] = set(PICTURE)
PICTURE["interop"] = PICTURE["experiments"] | {"experiments"}
PICTURE["cli_models"] = PICTURE["interop"] | {"interop"}
PICTURE["cli"] = PICTURE["cli_models"] | {"cli_models"}
PICTURE["__main__"] = {"cli"}
PICTURE["__init__"] = set(PICTURE)

NO_PYRO = {"numerics", "networks", "data", "plots", "parallel"}
NO_TORCH = {"plots"}
ROOT_NAMES = {"__version__"}  # what `import pyro_vae` may be used for inside the package


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of everything a module imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def attributes_of(tree: ast.AST, module: str) -> set[str]:
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == module
    }


def violations(path: str, source: str) -> list[str]:
    """What a file of the package, by its path in it, does that the picture does not show."""
    unit = path.split("/")[0].removesuffix(".py")
    if unit not in PICTURE:
        return [f"{path}: '{unit}' is not in the picture"]
    tree = ast.parse(source)
    names = imported(tree)
    found = [f"relative import {name}" for name in names if name.startswith(".")]
    targets = {name.split(".")[1] for name in names if name.startswith("pyro_vae.")}
    if unit != "__init__":
        targets -= ROOT_NAMES
        found += [f"uses pyro_vae.{name}" for name in attributes_of(tree, "pyro_vae") - ROOT_NAMES - {unit}]
    found += [f"imports pyro_vae.{target}" for target in targets - PICTURE[unit] - {unit}]

    poutine = any(name == "pyro.poutine" or name.startswith("pyro.poutine.") for name in names)
    if unit != "programs" and (poutine or "poutine" in attributes_of(tree, "pyro")):
        found.append("uses pyro.poutine")
    roots = {name.split(".")[0] for name in names}
    found += [f"imports {root}" for root in roots & {"pyro"} if unit in NO_PYRO]
    found += [f"imports {root}" for root in roots & {"torch"} if unit in NO_TORCH]
    calls = (n.func for n in ast.walk(tree) if isinstance(n, ast.Call))
    if unit != "cli" and any(isinstance(f, ast.Name) and f.id == "print" for f in calls):
        found.append("prints")
    return [f"{path} {what}" for what in sorted(found)]


FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def test_the_package_was_found():
    assert {"programs/weights.py", "objectives/sgvb.py", "models/vae.py", "evaluation/importance.py"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_the_picture_holds(file):
    assert violations(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


def test_the_picture_has_no_cycle():
    order: list[str] = []
    left = {unit: set(targets) for unit, targets in PICTURE.items() if unit != "__init__"}
    while left:
        ready = sorted(unit for unit, targets in left.items() if targets <= set(order))
        assert ready, f"a cycle among {sorted(left)}"
        order += ready
        left = {unit: targets for unit, targets in left.items() if unit not in ready}


def test_oracles_know_nothing_of_the_package():
    for name in ("oracles.py", "statistics.py"):
        names = imported(ast.parse((Path(__file__).parent / name).read_text(encoding="utf-8")))
        assert not any(imported_name.startswith("pyro_vae") for imported_name in names)


PLANTED = {
    "a model that imports an objective": ("models/vae.py", "from pyro_vae.objectives import SGVB", "objectives"),
    "an objective that imports a model": ("objectives/sgvb.py", "import pyro_vae.models.vae", "models"),
    "by a name of the root": ("models/vae.py", "from pyro_vae import SGVB", "SGVB"),
    "by an attribute of the root": ("models/vae.py", "import pyro_vae\npyro_vae.fit(1)", "fit"),
    "inside a function": ("data/mnist.py", "def f():\n    from pyro_vae.programs import Program", "programs"),
    "only for types": (
        "numerics.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pyro_vae.programs import Program",
        "programs",
    ),
    "a relative import": ("models/vae.py", "from ..objectives import SGVB", "relative"),
    "poutine by from": ("objectives/sgvb.py", "from pyro import poutine", "poutine"),
    "poutine by module": ("hmc.py", "import pyro.poutine as p", "poutine"),
    "a part of poutine": ("hmc.py", "from pyro.poutine.util import prune_subsample_sites", "poutine"),
    "poutine by attribute": ("models/vae.py", "import pyro\npyro.poutine.trace", "poutine"),
    "Pyro in the data": ("data/batches.py", "import pyro.distributions as dist", "imports pyro"),
    "torch in the plots": ("plots.py", "from torch import Tensor", "imports torch"),
    "a print": ("training/loop.py", "def f(x):\n    print(x)", "prints"),
    "a file nobody drew": ("utils.py", "", "not in the picture"),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_violation_is_seen(plant):
    path, source, said = PLANTED[plant]
    assert any(said in violation for violation in violations(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/vae.py", "import pyro\nfrom pyro_vae.networks import MLP"),
        ("models/vae.py", "from pyro_vae.models.registration import register"),
        ("training/loop.py", "import pyro_vae\nversion = pyro_vae.__version__"),
        ("programs/weights.py", "from pyro import poutine"),
        ("cli.py", "print(1)"),
        ("training/loop.py", '"""print(x)"""'),
    ],
)
def test_what_the_picture_shows_is_allowed(path, source):
    assert violations(path, source) == []
