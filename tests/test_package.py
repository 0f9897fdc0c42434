"""The package as a whole: what importing it costs, which module may import which, and what its files say of it."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import diffusers_rcfd

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "diffusers_rcfd"
MODULES = {
    ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}

# The rooms from the top of the house to its floor: a module imports from its own room and from those below.
LAYERS = [
    "__main__", "cli", "trainers", "evaluation", "pipelines", "hub", "distillation", "losses", "models", "schedulers",
    "data", "saving", "validation",
]  # fmt: skip
# Modules that are read before any heavy library is loaded, so that `--help` answers at once.
LIGHT = [
    "",
    "__main__",
    "cli.distill",
    "cli.sfd",
    "data.config",
    "distillation.rungs",
    "evaluation.config",
    "schedulers.names",
    "trainers.adoption_config",
    "trainers.config",
    "validation",
]

# Distributions whose import name is not their own name.
DISTRIBUTION_OF = {"PIL": "pillow", "yaml": "pyyaml"}
EXTRA_OF = {
    "pipelines.onnx_runtime": "ONNX_REQUIRES",
    "cli.demo": "DEMO_REQUIRES",
    "evaluation.lite0": "JUDGES_REQUIRES",
}  # of a module that an extra is for, which asks for it by name


def imported_names(path: Path) -> set[str]:
    """Dotted names of all that a module imports, also inside functions and by `import_module` with a literal name.

    `from a import b` gives `a.b`.
    """
    names, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for_type_checkers = [
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    never_run = {inner for node in for_type_checkers for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in never_run:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [PACKAGE] if node.level else []
            base += [node.module] if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def import_graph() -> dict[str, set[str]]:
    """Each module of the package with the modules of the package that it imports."""
    graph = {}
    for module in MODULES.keys() - {"__init__"}:  # the lazy `__init__` imports nothing by itself
        graph[module] = set()
        for name in imported_names(MODULES[module]):
            top, _, rest = name.partition(".")
            if top != PACKAGE or rest in ("", "__version__"):
                continue
            while rest not in MODULES and "." in rest:
                rest = rest.rpartition(".")[0]
            graph[module].add(diffusers_rcfd._MODULE_OF.get(rest, rest))
        graph[module].discard(module)
    return graph


def quickstart_commands() -> list[str]:
    """Lines of the bash blocks in the README's Quickstart section."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Quickstart\s*$(.*?)(?=^## |\Z)", readme, re.MULTILINE | re.DOTALL)
    assert section, "README.md has no section '## Quickstart'"
    blocks = re.findall(r"^```(?:bash|sh)\s*$(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def declared_requirements(listed: str = "INSTALL_REQUIRES") -> set[str]:
    """Names of the distributions that a plain installation brings, or an extra, as setup.py lists them."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == listed:
            return {re.match(r"[\w-]+", requirement)[0] for requirement in ast.literal_eval(node.value)}
    raise AssertionError(f"setup.py has no {listed}")


def modules_loaded_by(module: str) -> set[str]:
    """Top-level names of `sys.modules` after an import in a fresh interpreter."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_no_heavy_library(module):
    loaded = modules_loaded_by(".".join(filter(None, [PACKAGE, module])))
    assert not loaded & {"torch", "diffusers", "transformers", "timm"}


def test_training_a_classifier_loads_no_library_of_metrics():
    assert "torch_fidelity" not in modules_loaded_by(f"{PACKAGE}.trainers.classifier")


@pytest.mark.parametrize("name", diffusers_rcfd.__all__)
def test_public_name_comes_from_its_module(name):
    module = import_module(f"{PACKAGE}.{diffusers_rcfd._MODULE_OF[name]}")
    value = getattr(diffusers_rcfd, name)
    assert value is getattr(module, name)
    assert getattr(value, "__module__", module.__name__) == module.__name__
    assert name in dir(diffusers_rcfd)


def test_public_names_are_those_shown_to_type_checkers():
    tree = ast.parse(MODULES["__init__"].read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    shown = {alias.name: node.module.partition(".")[2] for node in block.body for alias in node.names}
    assert shown == diffusers_rcfd._MODULE_OF


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="diffusers_rcfd.*no_such_name"):
        _ = diffusers_rcfd.no_such_name


def test_import_graph_has_no_cycle():
    graph = import_graph()
    assert "schedulers.noise_schedules" in graph["schedulers.scheduling_rcfd"], "the graph misses an import"
    assert "hub.model_card" in graph["pipelines.pipeline_rcfd"], "the graph misses an import inside a function"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"the package imports in a circle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"__init__"}))
def test_module_imports_from_its_own_room_and_those_below(module):
    def floor(name):
        return LAYERS.index(name.partition(".")[0])

    above = [name for name in import_graph()[module] if floor(name) < floor(module)]
    assert not above


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_is_installed(module):
    tops = {name.split(".")[0] for name in imported_names(MODULES[module])} - sys.stdlib_module_names - {PACKAGE}
    distributions = {DISTRIBUTION_OF.get(top, top.replace("_", "-")) for top in tops}
    allowed = declared_requirements() | (declared_requirements(EXTRA_OF[module]) if module in EXTRA_OF else set())
    assert distributions <= allowed  # `examples`, `tests` and `benchmarks` are not among them either


@pytest.mark.parametrize("module", MODULES)
def test_public_definitions_have_docstrings(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = [node for node in tree.body if isinstance(node, definitions) and not node.name.startswith("_")]
    for parent in [node for node in found if isinstance(node, ast.ClassDef)]:
        found += [node for node in parent.body if isinstance(node, definitions) and not node.name.startswith("_")]
    assert ast.get_docstring(tree)
    assert not [node.name for node in found if not ast.get_docstring(node)]


def calls_of_networks(path: Path) -> list[str]:
    """Calls of something that is named like a diffusion network, such as `pipeline.unet(z, t)`."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    names = [(call, getattr(call, "attr", getattr(call, "id", ""))) for call in calls]
    return [ast.unparse(call) for call, name in names if name in ("unet", "network", "model", "teacher_network")]


def test_a_diffusion_network_is_called_in_one_file():
    classifiers = {"models.feature_classifier", "trainers.classifier", "evaluation.inception"}
    callers = {module for module, path in MODULES.items() if calls_of_networks(path)} - classifiers
    assert callers == {"models.denoiser"}


def test_changelog_and_citation_carry_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[(\d[^\]]*)\]", changelog, re.MULTILINE)[1] == diffusers_rcfd.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == diffusers_rcfd.__version__


def test_readme_quickstart_is_two_commands():
    commands = quickstart_commands()
    assert len(commands) == 2, commands
    train, test = commands
    script = re.fullmatch(r"pip install -e \. && accelerate launch (examples/\w+\.py)", train)
    assert script and (ROOT / script[1]).is_file()
    assert test == 'pip install -e ".[test]" && pytest'


def test_no_file_names_a_place_on_one_machine():
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"(?<![\w.:/-])/(?:home|root|tmp|Users|work)/\w")
    paths = [ROOT / name for name in result.stdout.split("\0") if name]
    assert Path(__file__).resolve() in paths
    offenders = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, UnicodeDecodeError):
            continue  # deleted but not yet committed; binary
        offenders += [f"{path.relative_to(ROOT)}: {line}" for line in text.splitlines() if pattern.search(line)]
    assert not offenders
