"""What code and documents cite exists: documents, their sections, links, tools and configs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for folder in ("mdp_mmdet3d", "projects", "tools", "benchmarks", "configs", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__) and "data" not in path.relative_to(ROOT).parts
)
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), ROOT / "tests/data/README.md"]
)
DOCUMENT = re.compile(r"(?<![\w/.-])((?:[\w-]+/)*[\w-]+\.md)\b(?!\()")
SECTION = re.compile(
    r"((?:[\w-]+/)*[\w-]+\.md)\)?(?:``)?,?\s+sections?\s+(\d[\d.]*\d|\d)(?:(?:,|\s+and)\s+(\d[\d.]*\d|\d))*"
)
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
PLACE = re.compile(r"(?<![\w/.-])((?:tools|configs|benchmarks|checkpoints|projects|tests)/[\w./-]*\w)")
COMMAND = re.compile(r"((?:tools|benchmarks)/\w+\.py|\bmdp-[a-z-]+)([^\n`]*)")
OPTION = re.compile(r"(?<!\S)--[a-z][\w-]*")
NOT_HERE = ("README.md", "table.md", "SUMMARY.md", "FILE.md")  # names that a user chooses or that are written elsewhere


def document(name: str) -> Path | None:
    """The document that a docstring means: by its path from the root, or by its name in docs/."""
    return next((path for path in (ROOT / name, *(ROOT / "docs").rglob(Path(name).name)) if path.is_file()), None)


def sections(path: Path) -> set[str]:
    return {number.rstrip(".") for number in re.findall(r"^#+ (\d[\d.]*)\s", path.read_text(encoding="utf-8"), re.M)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_documents_and_sections_that_code_cites_exist(path):
    text = re.sub(r"\s*\n\s*#?\s*", " ", path.read_text(encoding="utf-8"))
    for name in DOCUMENT.findall(text):
        assert name in NOT_HERE or document(name), f"{name} is not in the repository"
    for match in SECTION.finditer(text):
        found = document(match[1])
        for number in re.findall(r"\d[\d.]*\d|\d", match[0].split("section", 1)[1]):
            assert number in sections(found), f"{match[0]}: {found.name} has sections {sorted(sections(found))}"


def test_sections_are_found_at_all():
    assert {"1", "3.1", "4", "4.1", "5", "5.1", "5.2"} <= sections(ROOT / "docs/method.md")
    cited = [m[0] for path in SOURCES for m in SECTION.finditer(path.read_text(encoding="utf-8"))]
    assert len(cited) > 8


def test_equations_of_the_method_are_numbered_through():
    numbers = re.findall(r"^    .*\s\((\d+)\)$", (ROOT / "docs/method.md").read_text(encoding="utf-8"), re.M)
    assert numbers == [str(i) for i in range(1, len(numbers) + 1)] and len(numbers) >= 8


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_work(path):
    for target, _ in LINK.findall(path.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_tools_and_configs_that_documents_name_exist(path):
    if path.name == "CHANGELOG.md":
        return  # history names what has moved since
    for name in PLACE.findall(path.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


def options_without_a_tool(text: str) -> list[str]:
    """Options on a command line of ``text`` that the tool of that line does not have."""
    wrong = []
    for tool, rest in COMMAND.findall(text.replace("\\\n", " ")):
        name = tool if "/" in tool else f"tools/{tool.removeprefix('mdp-').replace('-', '_')}.py"
        if (ROOT / name).is_file():
            source = (ROOT / name).read_text(encoding="utf-8")
            wrong += [f"{tool} {option}" for option in OPTION.findall(rest) if f'"{option}"' not in source]
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_options_that_documents_use_exist(path):
    if path.name != "CHANGELOG.md":
        assert options_without_a_tool(path.read_text(encoding="utf-8")) == []


def test_a_mistyped_option_is_found():
    text = "python tools/prune.py x.py --budgets 1 and `mdp-export w --no` but --budget of\n"
    text += "tools/prune.py x.py \\\n --budget 1"
    assert options_without_a_tool(text) == ["tools/prune.py --budgets", "mdp-export --no"]
