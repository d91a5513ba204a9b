"""pre-commit checks what `make lint` checks, with the versions that `make setup` installs."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
HOOKS = [
    hook
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    for hook in repository["hooks"]
]


def test_versions_are_those_of_the_lock():
    lock = set((ROOT / "requirements/lock.txt").read_text(encoding="utf-8").split("\n"))
    pins = [pin for hook in HOOKS for pin in hook["additional_dependencies"]]
    assert pins and not [pin for pin in pins if pin not in lock]


def test_commands_are_those_of_make_lint():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert recipe
    commands = [line.split(" -m ", 1)[1] for line in recipe[1].splitlines()]
    assert [hook["entry"] for hook in HOOKS] == commands and not any(hook["pass_filenames"] for hook in HOOKS)
