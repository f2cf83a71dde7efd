"""The tree: every package has a floor, and a test file is found by the name of its module."""

from __future__ import annotations

from pathlib import Path

from test_scaffolding import FLOOR, SOURCE

TESTS = Path(__file__).parent

# Modules beside the packages that all of them may import.
LEAVES = {"components", "digests", "environment", "errors", "files", "folders", "owner", "patterns", "reading"}

# Tests of the whole, which no single module names.
WHOLE = {
    "architectures/test_real_size",
    "checkpoint/test_format_page",
    "checkpoint/test_old_versions",
    "contract/test_models",
    "contract/test_pipelines",
    "fuzz/test_campaign",
    "cli/test_processes",
    "cli/test_verbs",
    "cli/test_video_verbs",
    "metrics/test_sanity",
    "report/test_browser",
    "test_bundled",
    "test_bundled_clips",
    "test_bundled_networks",
    "test_docs",
    "test_examples",
    "test_gpu_benchmark",
    "test_layout",
    "test_scaffolding",
}


def modules(folder: Path) -> set[str]:
    """Names of the modules and packages below a folder of the source: ``triton_linear`` for ``triton/linear.py``."""
    paths = [path.relative_to(folder).with_suffix("") for path in folder.rglob("*") if path.suffix == ".py"]
    return {"_".join(part for part in path.parts if part != "__init__").strip("_") for path in paths} - {""}


def strangers(names: list[str], source: Path) -> list[str]:
    """Test files that neither are named like a module of their folder nor begin with its name."""
    found = []
    for name in names:
        folder, _, file = name.rpartition("/")
        topic = file.removeprefix("test_")
        known = modules(source / folder)
        if not any(topic == module or topic.startswith(f"{module}_") for module in known):
            found.append(name)
    return found


def test_every_package_and_module_has_a_floor() -> None:
    names = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name not in ("recipes", "__pycache__")}
    names |= {path.stem for path in SOURCE.glob("*.py")}
    assert names - LEAVES == set(FLOOR)


def test_a_test_file_is_named_like_its_module() -> None:
    names = sorted(str(path.relative_to(TESTS).with_suffix("")) for path in TESTS.rglob("test_*.py"))
    assert set(names) >= WHOLE
    assert strangers([name for name in names if name not in WHOLE], SOURCE) == []


def test_strangers_are_found() -> None:
    names = ["numerics/test_gptq", "numerics/test_gptq_blocks", "numerics/test_gptqs", "engines/test_triton_linear"]
    assert strangers(names, SOURCE) == ["numerics/test_gptqs"]
