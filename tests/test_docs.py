"""The documentation: its examples run as written, its commands parse, and its links and paths lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from ditq.cli.app import build
from ditq.openvino.runtime import why_unavailable
from ditq.recipe import load

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bundled" / "README.md", *(ROOT / "docs").rglob("*.md")]
)
# Every block of these needs a GPU and a checkpoint, as the page says.
NEEDS_A_GPU = {"docs/run-on-a-gpu.md"}
# Extras that a page names; it is skipped where they are not installed.
NEEDS_MODULES = {"docs/deploy-on-a-cpu.md": ["openvino"], "docs/quantize-your-model.md": ["peft"]}
# Roots of the paths that prose names. CHANGELOG.md is not among the pages: it names paths of the past.
NAMED_PATH = re.compile(r"(?<![\w./-])(?:src|tests|benchmarks)/[\w./*-]*[\w*/]")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        info: the info string, e.g. ``python no-run``.
        line: the number of its first line of code, counted from 1.
        before: the paragraph before it.
    """

    info: str
    code: str
    line: int
    before: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = []
    for match in re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```", text, re.M | re.S):
        before = [part for part in text[: match.start()].split("\n\n") if part.strip()]
        code = re.sub(rf"^{match[1]}", "", match[3], flags=re.M)
        found.append(Block(match[2].strip(), code, text.count("\n", 0, match.start(3)) + 1, (before or [""])[-1]))
    return found


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+?) *$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path, text: str) -> list[str]:
    """Relative links to files or headings that do not exist."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve()
        exists = not path or file.exists()
        if not exists or (anchor and anchor not in anchors(file.read_text() if path else text)):
            dead.append(target)
    return dead


def dead_paths(page: Path, text: str) -> list[str]:
    """Paths of the repository that prose or code names and that do not exist; placeholders (NAME) are none."""
    named = {match for match in NAMED_PATH.findall(text) if not re.search(r"[A-Z]{3}", Path(match).stem)}
    return sorted(path for path in named if not any(any(base.glob(path)) for base in (ROOT, page.parent)))


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of the console blocks, and of the prose's inline code, in words and without comments."""
    lines = [
        line.removeprefix("$ ")
        for block in blocks(text)
        if block.info == "console"
        for line in block.code.replace("\\\n", " ").splitlines()
        if line.startswith("$ ")
    ]
    lines += [code.replace("\n", " ") for code in re.findall(r"`((?:ditq|python) [^`]+)`", prose(text))]
    for line in lines:
        words = shlex.split(line, comments=True)
        yield words[: words.index(">")] if ">" in words else words


def complaint(words: list[str], verbs: dict[str, Any]) -> str:
    """What is wrong with a command of a page; empty where nothing is."""
    if words[0] == "ditq":
        return _complaint_of_verb(words[1:], verbs)
    if words[0] == "python" and len(words) > 1 and words[1].startswith("benchmarks/"):
        script = ROOT / words[1]
        source = script.read_text() if script.is_file() else ""
        unknown = [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in source]
        return "" if source and not unknown else f"{words[1]}: {unknown or 'no such file'}"
    return ""


def _complaint_of_verb(words: list[str], verbs: dict[str, Any]) -> str:
    if not words or words[0] not in verbs:
        return f"no such verb: {words[:1]}"
    if words[-1] in ("...", "--help") or len(words) == 1:  # `ditq compare`, in a sentence
        return ""
    try:
        parameters = verbs[words[0]].make_context(words[0], words[1:]).params
        if recipe := parameters.get("recipe"):
            load(recipe).override(parameters.get("overrides") or [])
    except Exception as error:  # whatever the parser of the command line raises is the finding
        abbreviated = type(error).__name__ == "MissingParameter" or "requires an argument" in str(error)
        return "" if abbreviated else f"{shlex.join(words)}: {error}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runnable = [block for block in blocks(page.read_text()) if block.info == "python"]
    if not runnable or name_of(page) in NEEDS_A_GPU:
        pytest.skip("no block that runs here")
    for module in [*NEEDS_MODULES.get(name_of(page), []), "ditq_bundled"]:
        pytest.importorskip(module)
    if "openvino" in NEEDS_MODULES.get(name_of(page), []) and (reason := why_unavailable()):
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in runnable:
        code = "\n" * (block.line - 1) + block.code  # so that a traceback shows the line of the page
        exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_block_that_does_not_run_says_what_it_needs(page: Path) -> None:
    for block in blocks(page.read_text()):
        assert block.info in ("", "python", "python no-run", "console", "bash", "yaml", "json"), block.info
        if block.info == "python no-run":
            assert "needs" in block.before, f"line {block.line}: the text before must say what the example needs"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    assert dead_links(page, text) == []
    assert dead_paths(page, text) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path) -> None:
    verbs = typer.main.get_command(build()).commands  # type: ignore[attr-defined]
    assert [wrong for words in commands(page.read_text()) if (wrong := complaint(words, verbs))] == []


def test_what_is_wrong_is_found() -> None:
    text = """# A page

[here](#a-page) [there](README.md#no-such-heading) [nowhere](no-such-file.md) [web](https://example.org/x)

It is in `src/ditq/recipe.py`, `src/ditq/recipes/*.yaml`, `src/ditq/FAMILY.yaml` and `tests/no_such_test.py`.

It needs a GPU:

```python no-run
raise SystemExit
```
"""
    page = ROOT / "page.md"
    assert dead_links(page, text) == ["README.md#no-such-heading", "no-such-file.md"]
    assert dead_paths(page, text) == ["tests/no_such_test.py"]
    assert blocks(text) == [Block("python no-run", "raise SystemExit\n", 10, "It needs a GPU:")]
    verbs = typer.main.get_command(build()).commands  # type: ignore[attr-defined]
    page_of_commands = """
```console
$ ditq quantize bundled:emoji-t2i --recipe viditq-w4a8 --set balance.alpha=0.7 --out folder   # right
$ ditq quantize bundled:emoji-t2i --recipe rtn-w4a8 \\
    --set balance.block=8 --out folder
$ ditq quantize bundled:emoji-t2i --no-such-option --out folder
$ ditq draw folder
$ python benchmarks/cpu/linear.py --runs 3
$ python benchmarks/cpu/linear.py --no-such-option
```
"""
    found = [complaint(words, verbs) for words in commands(page_of_commands)]
    assert [bool(x) for x in found] == [False, True, True, True, False, True]
    assert "balance.block has no effect" in found[1]
