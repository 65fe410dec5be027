"""What holds for every module of the package: quiet imports, who imports whom, docstrings and their examples."""

import ast
import doctest
import importlib
import inspect
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bayesinf

PACKAGE = Path(bayesinf.__file__).parent


def find_modules() -> dict[str, Path]:
    """Every module of the package by its import name, through the links."""
    found = {}
    for folder, _, files in os.walk(PACKAGE, followlinks=True):
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return dict(sorted(found.items()))


MODULES = find_modules()
LIBRARY = [name for name in MODULES if not name.endswith("__main__")]

QUIET = """
import sys
{imports}
import jax._src.xla_bridge
assert not jax._src.xla_bridge.backends_are_initialized(), "the import started a JAX backend"
loaded = {{name.partition(".")[0] for name in sys.modules}}
unwanted = loaded & {{"matplotlib", "arviz_plots", "arviz", "blackjax", "tensorflow", "torch"}}
assert not unwanted, f"the import loaded {{sorted(unwanted)}}"
"""


def test_importing_every_module_is_quiet():
    script = QUIET.format(imports="\n".join(f"import {name}" for name in LIBRARY))
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


TRANSFORMED = """
import jax, jax.numpy as jnp
import bayesinf as bi
data = jnp.ones(3)
target = bi.Target(lambda x, y: -0.5 * jnp.sum((x - y) ** 2), data)
bi.Target(jax.jit(target.logdensity))
bi.kernels.ItoChain(jax.grad(target.logdensity), lambda x: 1.0, step_size=0.1)
"""


def test_transformed_functions_are_taken_without_a_warning():
    done = subprocess.run([sys.executable, "-W", "always", "-c", TRANSFORMED], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def imports_of(name: str) -> set[str]:
    """The modules of this package that a module imports when it is imported itself."""
    imported = set()
    for node in top_level(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            base = node.module or ""
            imported |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return {module for module in imported if module in MODULES}


def top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run on import: those of the module, and in its if and try; not `if TYPE_CHECKING`."""
    statements, queue = [], list(tree.body)
    while queue:
        node = queue.pop()
        statements.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        for field in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
                queue += getattr(node, field, [])
    return statements


def room_of(name: str) -> str:
    """ "kernels", "models", "core", or "" for what brings all together."""
    parts = name.split(".")
    if len(parts) == 1 or parts[1] == "__main__":
        return ""
    return parts[1] if parts[1] in ("kernels", "models") else "core"


@pytest.mark.parametrize("name", LIBRARY)
def test_rooms_import_only_what_they_may(name):
    for imported in imports_of(name):
        pair = room_of(name), room_of(imported)
        assert pair not in {("core", "kernels"), ("core", "models"), ("models", "kernels")}, imported
        if pair == ("kernels", "models"):
            assert imported == "bayesinf.models.state_space"


def test_no_module_imports_in_a_circle():
    order = TopologicalSorter({name: imports_of(name) - {name} for name in LIBRARY})
    assert set(order.static_order()) == set(LIBRARY)


def public_objects(name: str) -> dict[str, object]:
    """The functions and classes that a module defines and names in `__all__`."""
    module = importlib.import_module(name)
    objects = {public: getattr(module, public) for public in getattr(module, "__all__", [])}
    return {public: value for public, value in objects.items() if inspect.isclass(value) or inspect.isfunction(value)}


@pytest.mark.parametrize("name", LIBRARY)
def test_what_is_public_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, "the module has no docstring"
    if MODULES[name].name != "__init__.py":
        assert hasattr(module, "__all__"), "the module does not say what is public"
    undocumented = [
        public
        for public, value in public_objects(name).items()
        if not value.__doc__ or value.__doc__.startswith(f"{public}(")  # what NamedTuple and dataclass make up
    ]
    assert not undocumented


def test_the_top_level_stays_small():
    public = [name for name in vars(bayesinf) if not name.startswith("_")]
    modules = [name for name in public if inspect.ismodule(getattr(bayesinf, name))]
    assert len(public) - len(modules) < 30


def examples_of(name: str) -> list[doctest.DocTest]:
    """The examples in the docstrings of what a module defines.

    The finder would ask whether an object's globals are the module's, which the type-checking hook hides.
    """
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(recurse=False)
    examples = finder.find(module, name, module=False, globs={})
    for own_name, value in vars(module).items():
        if getattr(value, "__module__", None) != name or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        members = {own_name: value}
        if inspect.isclass(value):
            members |= {f"{own_name}.{member}": unwrap(vars(value)[member]) for member in vars(value)}
        for member, documented in members.items():
            if inspect.isclass(documented) or inspect.isroutine(documented):
                examples += finder.find(documented, f"{name}.{member}", module=False, globs={})
    return [example for example in examples if example.examples]


def unwrap(member):
    """The function of a class method, static method or property."""
    return getattr(member, "__func__", None) or getattr(member, "fget", None) or member


SLOW = (  # to compile
    "kernels.coupled_sweep",
    "kernels.inference_scaling.speculative",
    "kernels.inference_scaling.text_generator",
    "kernels.particle_gibbs",
    "kernels.particle_marginal",
    "kernels.path_tree",
    "kernels.score",
    "kernels.unbiased_smoother",
    "models.conformal.risk",
    "models.gp.functional_prior",
    "models.gp.low_rank",
    "models.gp.scale_mixture",
    "models.gp.vecchia",
    "models.hmm.as_state_space",
    "models.hmm.gibbs",
    "models.hmm.model",
    "models.hmm.semi_markov_model",
    "models.language.transformer",
    "models.sir",
)


def test_slow_modules_are_there():
    assert {f"bayesinf.{name}" for name in SLOW} <= set(LIBRARY)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name.removeprefix("bayesinf.") in SLOW)) for name in LIBRARY],
)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    said: list[str] = []
    for example in examples_of(name):
        runner.run(example, out=said.append)
    assert not said, "".join(said)


def test_examples_are_found():
    expected = {
        "bayesinf.target": {"Target", "Target.from_numpyro"},
        "bayesinf.kernels.langevin": {"MALA"},
        "bayesinf.models.state_space": {"StateSpaceModel"},
        "bayesinf.conformance.invariance": {"exact_start_invariance"},
    }
    for module, names in expected.items():
        assert {f"{module}.{name}" for name in names} <= {example.name for example in examples_of(module)}
