"""The promises of the repository itself: packaging, import floors, a lean import, no strayed paths."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "ditq"

# From the ground up. Modules of one floor may import each other. Any other module is a leaf, below them all.
FLOORS = [
    {"numerics"},
    {"plan", "recipe"},
    {"architectures", "engines"},
    {"layers"},
    {"models", "trace"},
    {"sampling"},
    {"calibration"},
    {"conversion"},
    {"allocation"},
    {"openvino"},
    {"checkpoint"},
    {"metrics", "report"},
    {"api", "requests", "adapters"},
    {"comparison"},
    {"cli", "__main__"},
    {"__init__"},
]
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
LEAF = -1


def floor(name: str) -> int:
    return FLOOR.get(name, LEAF)


def imported_modules(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of every import, wherever it stands; ``package`` resolves relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def upward_imports(source: str, path: Path) -> list[str]:
    """Imports of ``path``, relative to the package, that reach a higher floor."""
    here = path.with_suffix("").parts[0]
    package = ["ditq", *path.parts[:-1]]
    found = []
    for line, name in imported_modules(ast.parse(source), package):
        root, _, rest = name.partition(".")
        if root != "ditq" or rest == "__version__":
            continue
        top = rest.partition(".")[0] or "__init__"
        if top not in FLOOR and not (SOURCE / top).is_dir() and not (SOURCE / f"{top}.py").exists():
            top = "__init__"  # `from ditq import quantize`: a name that the front door gives
        if floor(top) > floor(here):
            found.append(f"{path}:{line} imports {name}, which is above {here}")
    return found


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The import statements that run when a module is imported: not those in functions, nor for type checkers."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "handlers", "orelse", "finalbody"):
                yield from at_import(getattr(node, part, []))


def import_graph(sources: dict[str, str], packages: set[str]) -> dict[str, set[str]]:
    """Which modules each module imports when it is imported.

    Args:
        sources: by dotted name.
        packages: those of them that are packages. That a module's import runs its packages first does not count.
    """
    graph = {}
    for name, source in sources.items():
        package = name.split(".") if name in packages else name.split(".")[:-1]
        statements = ast.Module(body=list(at_import(ast.parse(source).body)), type_ignores=[])
        known = graph[name] = set[str]()
        for _, imported in imported_modules(statements, package):
            while imported and imported not in sources:
                imported = imported.rpartition(".")[0]
            known |= {imported} - {"", name}
    return graph


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last one the first, if there are any."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        found = next((c for other in sorted(graph[name]) if (c := search(other, [*path, name]))), [])
        done.add(name)
        return found

    return next((found for name in graph if (found := search(name, []))), [])


def wheel_files(project: Path) -> set[str]:
    """The files that a wheel of ``project`` would hold, relative to ``project``."""
    return {file.relative_path for file in WheelBuilder(str(project)).recurse_included_files()}


def test_extras_and_entry_point_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {"openvino", "triton", "report", "metrics", "search", "demo", "dev", "bench"}
    assert set(project["optional-dependencies"]) == extras
    assert project["scripts"] == {"ditq": "ditq.cli:main"}


def test_constraints_pin_what_pyproject_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        re.split("==", line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    named = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in project["dependencies"]}
    peers = {re.match(r"[\w-]+", peer)[0].lower() for peer in project["optional-dependencies"]["bench"]}
    assert named | peers <= pinned
    assert not pinned & {"torchvision", "lpips", "torch-fidelity"}


def test_wheel_holds_every_recipe_and_architecture_and_the_page() -> None:
    data = {str(path.relative_to(ROOT)) for path in SOURCE.rglob("*.yaml")}
    assert {Path(path).parts[2] for path in data} == {"recipes", "architectures"}
    page = {f"src/ditq/report/page/page.{kind}" for kind in ("html.j2", "css", "js")}
    assert data | page | {"src/ditq/py.typed"} <= wheel_files(ROOT)


def test_bundled_wheel_holds_every_model_prompt_and_network() -> None:
    package = ROOT / "bundled" / "src" / "ditq_bundled"
    folders = ("models", "networks", "prompts")
    data = {path for folder in folders for path in (package / folder).rglob("*") if path.is_file()}
    assert {str(path.relative_to(ROOT / "bundled")) for path in data} <= wheel_files(ROOT / "bundled")


def test_bundled_names_resolve_to_pipelines() -> None:
    import ditq_bundled

    if not ditq_bundled.names():
        pytest.skip("no bundled models in this checkout yet")
    for name in ditq_bundled.names():
        assert list(ditq_bundled.path(name).rglob("*.safetensors"))
        assert ditq_bundled.prompts(name, "evaluation")


def test_bundled_errors_name_what_is_known() -> None:
    import ditq_bundled

    with pytest.raises(ValueError, match="known: " + (", ".join(ditq_bundled.names()) or "none")):
        ditq_bundled.path("no-such-model")
    with pytest.raises(ValueError, match="known: emoji-class, emoji-t2i"):
        ditq_bundled.prompts("no-such-model", "calibration")
    with pytest.raises(ValueError, match="calibration, evaluation; got 'test'"):
        ditq_bundled.prompts("emoji-t2i", "test")
    with pytest.raises(ValueError, match="known: " + (", ".join(ditq_bundled.networks()) or "none")):
        ditq_bundled.network("no-such-network")


@pytest.mark.parametrize("name", ["emoji-t2i", "emoji-class"])
def test_prompt_lists_share_no_concept(name: str) -> None:
    import ditq_bundled

    def concepts(split: str) -> list[str]:
        return [re.sub(r".* emoji of an? ", "", prompt) for prompt in ditq_bundled.prompts(name, split)]

    calibration, evaluation = concepts("calibration"), concepts("evaluation")
    assert (len(set(calibration)), len(set(evaluation))) == (64, 128)
    assert not set(calibration) & set(evaluation)


@pytest.mark.parametrize(
    ("source", "path", "count"),
    [
        ("from ditq.plan import Plan", "numerics/gptq.py", 1),
        ("def f():\n    from ditq import conversion", "layers/linear.py", 1),
        ("from ..api import quantize", "conversion/draft.py", 1),
        ("from ditq import quantize", "metrics/fidelity.py", 1),
        ("import ditq.api as a", "errors.py", 1),
        ("from . import packing\nfrom ditq.errors import UsageError", "numerics/gptq.py", 0),
        ("from ditq.plan import Plan\nimport torch", "recipe.py", 0),
        ("from .. import plan, numerics", "conversion/draft.py", 0),
    ],
)
def test_floor_check_sees_upward_imports(source: str, path: str, count: int) -> None:
    assert len(upward_imports(source, Path(path))) == count


def test_nobody_imports_upwards() -> None:
    paths = sorted(SOURCE.rglob("*.py"))
    assert paths
    found = [line for path in paths for line in upward_imports(path.read_text(), path.relative_to(SOURCE))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("b", "expected"),
    [
        ("from p import a", ["p.a", "p.b"]),
        ("import p.a as x", ["p.a", "p.b"]),
        ("from .a import thing", ["p.a", "p.b"]),
        ("try:\n    from p.a import thing\nexcept ImportError:\n    pass", ["p.a", "p.b"]),
        ("try:\n    pass\nexcept ImportError:\n    from p.a import thing", ["p.a", "p.b"]),
        ("class C:\n    from p.a import thing", ["p.a", "p.b"]),
        ("def f():\n    from p.a import thing", []),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.a import thing", []),
        ("import torch\nfrom p.c import thing", []),
    ],
)
def test_cycle_check_sees_cycles_of_imports(b: str, expected: list[str]) -> None:
    sources = {"p": "from p.a import thing", "p.a": "from p.b import other", "p.b": b, "p.c": ""}
    assert cycle(import_graph(sources, {"p"})) == expected


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {path: (path.parent if path.stem == "__init__" else path.with_suffix("")) for path in SOURCE.rglob("*.py")}
    dotted = {path: ".".join(name.relative_to(SOURCE.parent).parts) for path, name in names.items()}
    sources = {dotted[path]: path.read_text() for path in sorted(dotted)}
    graph = import_graph(sources, {dotted[path] for path in dotted if path.stem == "__init__"})
    assert "ditq.plan" in graph["ditq.recipe"]
    assert cycle(graph) == []


def test_import_is_lean() -> None:
    code = "import sys, ditq; print(sorted({'torch', 'diffusers', 'transformers', 'openvino'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_no_file_names_a_private_path() -> None:
    # A path of somebody's machine: an absolute home or work folder, or a virtual environment in a temporary one.
    private = re.compile(r"(?<![\w.$}*/-])/(?:(?:home|root|Users|work)/|tmp/\w*venv)")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.split("\0") if name]
    assert names
    found = []
    for name in names:
        path = ROOT / name
        if path.suffix in {".safetensors", ".png", ".npz"} or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{name}: {match[0]}" for match in private.finditer(text)]
    assert not found, "\n".join(found)
