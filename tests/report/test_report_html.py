"""report.html: its numbers are report.json's, nothing comes from outside, old and partial runs work or say why not."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import onnx
import pytest
from onnx import TensorProto, helper

from mdp_mmdet3d.errors import FileFormatError, MdpError, StructureMismatchError
from mdp_mmdet3d.report.html import change as relative
from mdp_mmdet3d.report.html import gained, number, write_html
from mdp_mmdet3d.report.html_answer import savers
from mdp_mmdet3d.report.html_front import front
from mdp_mmdet3d.report.html_inputs import RunFiles
from mdp_mmdet3d.report.html_latency import ModuleLatency, compared
from mdp_mmdet3d.report.html_order import first_uses
from mdp_mmdet3d.report.html_structure import Card, Engine, Module, Places, children_first, structure

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Page(HTMLParser):
    """Text, machine-readable numbers and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.values: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.values += [found["value"]] if tag == "data" else []

    def handle_startendtag(self, tag, attrs):
        self.ids += [dict(attrs)["id"]] if "id" in dict(attrs) else []

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += f" {data}"


def with_values(report):
    """Add what a run with values of the loss and repair reports."""
    first = {"how": "by single cuts", "plan": "a", "predicted": 0.25, "measured": 1.5, "error": 0.125}
    second = {"how": "corrected", "plan": "b", "predicted": 0.5, "measured": 0.75, "error": 0.0625}
    report["repair"] = {"refitted": 49, "left": 45, "median_held_out_error": {"before": 0.385, "after": 0.2}}
    report["values"] = {**second, "candidates": [first, second], "dense_loss": 1.25, "frames": 4}
    report["values"] |= {"reliability": 0.875, "delivered": -0.125, "delivered_error": 0.03125}


def page_of(run, **options):
    text = write_html(run, **options).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and len(page.ids) == len(set(page.ids))
    return text, page


def change(run, edit):
    report = json.loads((run / "report.json").read_text())
    edit(report)
    (run / "report.json").write_text(json.dumps(report))
    return report


def test_numbers_are_those_of_the_report(run):
    text, page = page_of(run)
    report = json.loads((run / "report.json").read_text())
    values = {float(value) for value in page.values}
    wanted = [
        report[name][key] for name in ("dense", "pruned") for key in ("latency_ms", "predicted_ms", "p90_ms", "fps")
    ]
    wanted += [report["speedup"], report["budget_ms"], report["not_prunable_ms"], report["solver"]["objective"]]
    wanted += [report["pruned"]["params"], *report["breakdown_ms"]["dense"].values()]
    wanted += [report["breakdown_ms"]["pruned"][name] for name in report["breakdown_ms"]["pruned"]]
    wanted += [figures["mAP"] for figures in report["accuracy"].values()]
    assert set(wanted) <= values
    for part in (
        "Random weights.",
        "pruned, repaired",
        "pruned, fine-tuned",
        "its width is <that> of the queries",
        "python tools/prune.py configs/x.py --budget 0.6",
        report["plan_hash"],
        report["solver"]["certificate"]["problem_sha256"],
        "5 % more latency",
    ):
        assert part in page.text, part
    for name in report["removed_blocks"]:
        assert name in text


def test_the_first_screen_answers_what_a_user_asks(run):
    def trained(budget_ms):
        def edit(report):
            report.update(weights="w.pth@0", budget_ms=budget_ms)
            report["provenance"]["settings"]["tolerance"] = 0.02

        return edit

    met = json.loads((run / "report.json").read_text())["pruned"]["latency_ms"]
    for budget_ms, word in ((met, "Budget met"), (met / 1.019, "within the tolerance"), (met / 1.03, "Budget missed")):
        change(run, trained(budget_ms))
        _, page = page_of(run, front_limit_s=0)
        assert word in page.text and ("ask for less" in page.text) == (word == "Budget missed")
    assert "The machine was busy." not in page.text
    assert f"python tools/export.py {run} --checkpoint {run}/finetune/finetuned.pth" in page.text

    change(run, lambda report: report.update(speedup=2 * report["speedup"]))
    assert "The machine was busy. Taking turns" in page_of(run, front_limit_s=0)[1].text

    def unfinished(report):
        del report["accuracy"]
        report["pruned"]["p90_ms"] = 3 * report["pruned"]["median_ms"]
        report["provenance"]["command"] = "python /venv/bin/mdp-prune x.py"

    change(run, unfinished)
    _, page = page_of(run)
    assert "The machine was busy." in page.text and "took 3 times" in page.text
    assert f"mdp-test {run}/pruned_config.py {run}/pruned.pth" in page.text and f"mdp-train {run}" in page.text
    change(run, lambda data: data.update(weights="random"))
    _, page = page_of(run)
    assert "Run it again with trained weights" in page.text and "Export it" not in page.text


def test_the_time_that_was_saved_is_told_by_module():
    rows = [ModuleLatency(name, dense, pruned, True) for name, dense, pruned in (("a", 3, 2), ("b", 9, 0), ("c", 1, 1))]
    found = savers(rows, {"b", "a.1", "a.1.ffn", "a.2", "ab.1"})
    assert [(row.name, blocks) for row, blocks in found] == [("b", 1), ("a", 2)]


def test_nothing_comes_from_outside(run):
    text, _ = page_of(run)
    assert not re.search(r"(?:https?:)?//[\w.-]+\.\w|@import|<link|src=", text)
    references = set(re.findall(r"""(?:url\(|href=["'])#([\w-]+)""", text))
    assert references and references <= set(Page(text).ids)


def test_structure_follows_the_network_and_shows_every_width(run):
    files = RunFiles.load(run)
    engines = structure(files)
    assert [engine.name for engine in engines] == ["image_encoder", "head"]
    layers = [la for e in engines for m in e.modules.values() for c in m.cards.values() for la in c.layers]
    shown = {layer.dimension: layer.kept for layer in layers if layer.dimension and not layer.gone}
    gone = {layer.dimension for layer in layers if layer.gone}
    assert files.removed, "the fixture's plan removes something"
    assert shown.keys() | gone == set(files.space.by_name)
    assert all(files.widths[name] == kept for name, kept in shown.items())
    cards = {c.path: c for e in engines for m in e.modules.values() for c in m.cards.values()}
    assert {path for path, card in cards.items() if card.removed} == files.removed & set(cards)
    drawn = sum(m.pruned_ms for e in engines for m in e.modules.values())
    fixed = json.loads((run / "report.json").read_text())["not_prunable_ms"]
    assert drawn + fixed == pytest.approx(files.report["solver"]["costs"]["latency_ms"])


def test_what_runs_after_a_modules_children_is_drawn_after_them(tmp_path):
    """A head whose branches follow its decoder in the graph, though the space lists them first."""
    weights = ("head.embed.weight", "head.decoder.layers.0.bias", "head.branches.0.weight")
    nodes = [helper.make_node("Add", [x, w], [y], w) for x, w, y in zip("abc", weights, "bcd")]
    floats = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ad"}
    values = [helper.make_tensor(name, TensorProto.FLOAT, [1], [1.0]) for name in weights]
    graph = helper.make_graph(nodes, "head", [floats["a"]], [floats["d"]], values)
    (tmp_path / "onnx" / "dense").mkdir(parents=True)
    onnx.save(helper.make_model(graph), tmp_path / "onnx" / "dense" / "head.onnx")

    def engine() -> Engine:
        paths = {"head": ("head.embed", "head.branches"), "head.decoder.layers": ("head.decoder.layers.0",)}
        return Engine("head", False, {p: Module(p, {c: Card(c, c) for c in cards}) for p, cards in paths.items()})

    drawn, unknown = engine(), engine()
    children_first(drawn, first_uses(tmp_path, "head"))
    cards = [card for module in drawn.modules.values() for card in module.cards]
    assert cards == ["head.embed", "head.decoder.layers.0", "head.branches"]
    children_first(unknown, first_uses(tmp_path, "image_encoder"))
    cards = [card for module in unknown.modules.values() for card in module.cards]
    assert cards == ["head.embed", "head.branches", "head.decoder.layers.0"]


def test_a_crowded_card_is_drawn_as_its_parts():
    """DenseNet's stages are no blocks and have dozens of layers; a short row of convolutions stays one card."""
    conv = SimpleNamespace(kind="conv")
    names = [f"backbone.stages.0.block.{i}.conv{j}" for i in range(5) for j in (1, 2)]
    names += ["backbone.stages.1.conv", "backbone.transitions.0.conv", "backbone.transitions.1.conv"]
    terms = [SimpleNamespace(name=name, block=None, signature=conv) for name in names]
    places = Places(SimpleNamespace(blocks=(), terms=terms))
    assert places.of(names[3], None) == ("backbone.stages.0", "backbone.stages.0.block.1")
    assert places.of("backbone.stages.1.conv", None) == ("backbone.stages", "backbone.stages.1")
    assert places.of("backbone.transitions.1.conv", None) == ("backbone", "backbone.transitions")


def test_repair_and_loss_are_told_in_words(run):
    change(run, with_values)
    _, page = page_of(run, front_limit_s=0)
    for part in (
        "49 of 94 layers",
        "0.385 before, 0.2 after",
        "+1.500 ± 0.125",
        "corrected (chosen)",
        "−0.125 ± 0.031",
    ):
        assert part in page.text, part
    assert "−0.125 ± 0.031" in page.text


def test_front_is_exact_bounded_and_holds_the_plan(run):
    files = RunFiles.load(run)
    found = front(files)
    shares = [(point.latency_ms, point.value) for point in found.points]
    assert shares == sorted(shares) and [v for _, v in shares] == sorted(v for _, v in shares)
    assert found.chosen in found.points and found.left_out == 0
    more, less = found.neighbour(1.05), found.neighbour(0.95)
    assert less.value <= found.chosen.value <= more.value
    assert more.latency_ms <= 1.05 * found.chosen.budget_ms * (1 + 1e-9)
    none = front(files, time_limit_s=1e-9)
    assert none.left_out > 0 and none.points == (none.chosen, none.dense)


def test_predictions_beside_measurements(run):
    rows = compared(RunFiles.load(run))
    assert [row.name for row in rows] == ["dense", "network 1", "network 2", "pruned"]
    assert max(abs(row.error) for row in rows[:-1]) < 1e-6  # the networks' times are the fixture's own model
    report = json.loads((run / "report.json").read_text())
    assert rows[-1].measured_ms == pytest.approx(report["pruned"]["latency_ms"] / 1.02)


def test_reports_of_version_1_and_missing_parts(run):
    def as_first_released(report):
        for key in ("provenance", "accuracy", "session_drift", "measured_end_to_end", "corrections", "breakdown_ms"):
            del report[key]
        for key in ("interpolated", "interpolated_entries", "latency_model", "latency_table", "differences", "seconds"):
            del report[key]
        report["device"] = {"cpu_model": "Old CPU", "onnxruntime": "1.16", "threads": 1}
        for name in ("dense", "pruned"):
            del report[name]["engines_ms"]
            report[name].update(encoder_ms=1.0, head_ms=2.0)

    change(run, as_first_released)
    (run / "problem.npz").unlink()
    (run / "whole_latency.json").unlink()
    _, page = page_of(run)
    assert "Old CPU" in page.text and "do not say which command" in page.text
    assert "Not shown: problem.npz is missing" in page.text and "whole_latency.json is missing" in page.text


def test_a_problem_of_another_run_is_not_used(run):
    change(run, lambda report: report["solver"].update(objective=report["solver"]["objective"] * 1.1))
    _, page = page_of(run)
    assert "problem.npz is of another run" in page.text


def test_a_target_run_says_that_it_was_not_measured(run):
    def for_target(report):
        report.update(measured_end_to_end=False, speedup=None, weights="checkpoint")
        report["latency_table"] = {"path": "orin.json", "sha256": "0", "entries": 7, "device": report["device"]}
        for name in ("dense", "pruned"):
            report[name].update(latency_ms=None, median_ms=None, p90_ms=None, engines_ms=None)

    change(run, for_target)
    _, page = page_of(run)
    assert "Not measured end to end." in page.text and "orin.json" in page.text and "Random" not in page.text
    assert "no whole network was measured on the target yet" in page.text


def test_unfinished_foreign_and_damaged_folders(run, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(MdpError, match=r"is no work directory of tools/prune\.py"):
        write_html(foreign)
    with pytest.raises(MdpError, match="is no folder"):
        write_html(tmp_path / "nowhere")
    report = (run / "report.json").read_text()
    (run / "report.json").unlink()
    with pytest.raises(MdpError, match=r"has not finished: report\.json is missing.*Run the same"):
        write_html(run)
    (run / "report.json").write_text(report[: len(report) // 2])
    with pytest.raises(FileFormatError, match="truncated or not JSON"):
        write_html(run)
    (run / "report.json").write_text(report)
    change(run, lambda data: data["pruned"].pop("macs"))
    with pytest.raises(FileFormatError, match=r"lacks pruned\.macs"):
        write_html(run)
    (run / "report.json").write_text(report)
    change(run, lambda data: data.update(plan_hash="another"))
    with pytest.raises(StructureMismatchError, match="another run was started here"):
        write_html(run)
    assert not list(run.glob("*.html")) and not list(run.glob(".report*"))


def test_numbers_for_people():
    assert [number(v) for v in (None, 0, 12345.6, 0.12345, 1e-7)] == ["–", "0", "12346", "0.123", "1.00e-07"]
    assert [relative(v) for v in (-1e-7, 1e-7, -0.02)] == ["0.0\u00a0%", "0.0\u00a0%", "−2.0\u00a0%"]


def test_an_accuracy_gained_has_the_decimals_of_the_accuracy():
    assert [gained(86.62, 88.4), gained(0.5823, 0.6425), gained(0.65, 0.65)] == ["−1.8", "−0.060", "+0.00"]


def test_chromium_renders_it(run, tmp_path):
    """No overflow at a phone's width, charts with a size, tables that sort, in the browser's own words."""
    browser = os.environ.get("MDP_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no chromium or google-chrome on the path, and MDP_CHROMIUM is not set")
    change(run, with_values)
    path = write_html(run)
    probe = """<script>
    document.querySelector("#milliseconds th:nth-child(4)").click();
    const cells = [...document.querySelectorAll("#milliseconds tbody td:nth-child(4) data")].map((d) => +d.value);
    document.title = JSON.stringify({width: document.documentElement.scrollWidth, seen: innerWidth, cells,
      charts: [...document.querySelectorAll("svg.chart")].map((s) => s.getBoundingClientRect().height)});
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text(path.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="{page.as_uri()}" style="width:390px;height:900px;border:0" '
        'onload="document.title = this.contentDocument.title"></iframe>'
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    options += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    done = subprocess.run(
        [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    assert found["width"] <= found["seen"] == 390
    assert len(found["charts"]) == 2 and min(found["charts"]) > 100
    assert found["cells"] == sorted(found["cells"], reverse=True) and len(set(found["cells"])) > 2


def test_every_kind_of_block_is_told_when_it_is_removed() -> None:
    from mdp_mmdet3d.report.html_structure import REPLACED
    from mdp_mmdet3d.space.types import BlockKind

    assert REPLACED.keys() == set(BlockKind)
