"""Commands in the documents: every tool understands them, and every config they name exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted((ROOT / "docs" / "recipes").glob("*.md")), ROOT / "docs/training.md", ROOT / "docs/tutorial.md"]


def commands(path: Path) -> list[list[str]]:
    """Command lines of the bash blocks that run a tool of this project, from the tool on."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            tools = [i for i, word in enumerate(words) if word.startswith("tools/")]
            if tools:
                found.append(words[tools[0] :])
    return found


CASES = [(path.name, command) for path in DOCUMENTS for command in commands(path)]


def test_there_are_commands() -> None:
    assert {name for name, _ in CASES} == {path.name for path in DOCUMENTS}
    assert {command[0] for _, command in CASES} >= {f"tools/{name}.py" for name in ("prune", "train", "test", "export")}


@pytest.mark.parametrize(("document", "command"), CASES, ids=[f"{d}-{i}" for i, (d, _) in enumerate(CASES)])
def test_a_command_is_understood_by_its_tool(document, command, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("tool", ROOT / command[0])
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", command)
    tool.parse_args()
    for word in command[1:]:
        value = word.split("=")[-1]
        if value.startswith("configs/"):
            assert (ROOT / value).is_file(), value


@pytest.mark.parametrize(
    ("document", "command"), [case for case in CASES if "--cfg-options" in case[1] and case[1][0] == "tools/train.py"]
)
def test_options_of_training_commands_name_existing_settings(document, command, monkeypatch) -> None:
    """The recipe overrides a pruned config, which has the keys of the training config that was pruned."""
    from mmengine.config import Config

    from mdp_mmdet3d.runner.train_config import SECTIONS

    config = Config.fromfile(ROOT / "configs/streampetr/streampetr_r50_704x256_428q_60e.py")
    for option in command[command.index("--cfg-options") + 1 :]:
        key = option.split("=")[0]
        if key.split(".")[0] in SECTIONS:
            assert key.split(".")[1] in SECTIONS[key.split(".")[0]][2], key
            continue
        value = config
        for part in key.split("."):
            value = value[int(part)] if part.isdigit() else value[part]
