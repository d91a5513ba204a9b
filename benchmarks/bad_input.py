"""Feed bad input of every kind that users were seen to have, and print what was not a clear error.

    python benchmarks/bad_input.py [--json FILE] [--only WORD]

A case is right if it ends in an error of `MdpError`'s family (a tool: in exit status 2 and one message without a
traceback) that names what the case says it must, or, where the input is unusual but good, in the right value.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

from bad_input_cases import GROUPS, TESTS, Assets, Case, make_assets  # noqa: E402

LIMIT_S = 120
WIDTH = 130  # characters of an outcome in the table


class Hangs(BaseException):
    """A case takes too long; nothing that is tried here catches it."""


def outcome(case: Case) -> tuple[bool, str]:
    """Whether a case ended as it should, and how it ended."""
    from mdp_mmdet3d.errors import MdpError

    def hangs(*_: object) -> None:
        raise Hangs(f"not done after {LIMIT_S} s")

    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LIMIT_S)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            value = case.run()
    except MdpError as error:
        message = str(error)
        if not case.names:
            return False, f"refused: {message}"
        lacking = [word for word in case.names if word.lower() not in message.lower()]
        if "\x1b" in message:
            return False, f"escape codes: {message!r}"
        return not lacking, f"{type(error).__name__}: {message}" + (f" (does not name {lacking})" if lacking else "")
    except AssertionError as error:
        return False, f"wrong: {error}"
    except BaseException as error:  # whatever comes, it is counted
        last = traceback.extract_tb(error.__traceback__)[-1]
        return False, f"traceback {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    finally:
        signal.alarm(0)
    return (True, f"right: {value}") if not case.names else (False, f"accepted: {value}")


def report(results: list[dict], before: list[dict]) -> str:
    """The table of all cases as Markdown."""
    earlier = {(item["group"], item["case"]): item for item in before}
    lines = [
        "# Bad input",
        "",
        "Made by `python benchmarks/bad_input.py --before BEFORE.json --report docs/results/bad_input.md`, on the",
        "tests' tiny StreamPETR and a miniature nuScenes. Before: commit 7831dad, by the same program. A case is right",
        "if it ends in an error of the `MdpError` family that names the fault, or, where the input is unusual but",
        "good, in the right value; others are **bold**.",
        "",
        f"{len(results)} cases; right before: {sum(item['right'] for item in before)}, "
        f"now: {sum(item['right'] for item in results)}.",
    ]
    for group in dict.fromkeys(item["group"] for item in results):
        lines += ["", f"## {group}", "", f"Test: {TESTS[group]}.", "", "| input | before | now |", "|---|---|---|"]
        for item in results:
            if item["group"] == group:
                old = earlier.get((group, item["case"]))
                lines.append(f"| {_cell(item['case'])} | {_told(old)} | {_told(item)} |")
    return "\n".join(lines) + "\n"


def _told(item: dict | None) -> str:
    if item is None:
        return "not there"
    return _cell(item["outcome"]) if item["right"] else f"**{_cell(item['outcome'])}**"


def _cell(text: str) -> str:
    """One line of a table, without the folder of one machine."""
    text = (
        re.sub(rf"/tmp/\S*/|{re.escape(str(ROOT))}/", "", " ".join(text.split()))
        .replace("|", "\\|")
        .replace("<", "&lt;")
        .replace("[", "\\[")
        .replace("]", "\\]")
    )
    return text if len(text) <= WIDTH else text[:WIDTH].rsplit(" ", 1)[0] + " ..."


def main() -> int:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every case and its outcome to this file")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--before", type=Path, help="outcomes (--json) of another release, for the report")
    parser.add_argument("--report", type=Path, help="write a table of all cases to this Markdown file")
    parser.add_argument("--assets", type=Path, help="folder to make models and data in, or to find them in")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        assets: Assets = make_assets(args.assets or Path(temporary) / "assets", Path(temporary) / "work")
        for name, cases in GROUPS.items():
            if args.only not in name:
                continue
            start = time.perf_counter()
            found = []
            for case in cases(assets):
                right, what = outcome(case)
                found.append({"group": name, "case": case.name, "right": right, "outcome": what})
                if not right:
                    print(f"NOT RIGHT  {name}: {case.name}: {what[:300]}", flush=True)
            results += found
            rights = sum(result["right"] for result in found)
            print(f"{name}: {rights} of {len(found)} ({time.perf_counter() - start:.1f} s)", flush=True)
    wrong = Counter(result["right"] for result in results)[False]
    print(f"{len(results)} cases, {wrong} not a clear error or not right")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    if args.report:
        before = json.loads(args.before.read_text(encoding="utf-8")) if args.before else []
        args.report.write_text(report(results, before), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
