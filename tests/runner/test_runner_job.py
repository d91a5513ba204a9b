"""The whole line on a tiny StreamPETR and a tiny miniature nuScenes: files, report, reuse, errors."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
from mmengine.config import Config
from rich.console import Console

from mdp_mmdet3d.adapters import adapter_of
from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import FileFormatError, InfeasibleBudgetError, MdpError, StructureMismatchError
from mdp_mmdet3d.runner.job import PruneJob
from mdp_mmdet3d.runner.settings import PruneSettings
from mdp_mmdet3d.solver import PruningProblem
from mdp_mmdet3d.surgery.plan import PruningPlan
from projects.streampetr.adapter import StreamPETRAdapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tiny_job_config):
    return tiny_job_config


def make_job(config, work_dir, **overrides):
    settings = PruneSettings.from_config({**config.prune, **overrides})
    return PruneJob(config, settings, work_dir, None, Console(quiet=True))


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("run")
    return work_dir, make_job(config, work_dir).run()


def test_report_and_files(run):
    work_dir, report = run
    for name in (
        "space.json",
        "importance.npz",
        "latency_table.json",
        "problem.npz",
        "plan.json",
        "pruned.pth",
        "pruned_config.py",
        "report.json",
        "report.html",
        "onnx/mdp_runtime.pyz",
        "structure.png",
        "onnx/dense/head.onnx",
        "onnx/pruned/head.onnx",
        "onnx/pruned/image_encoder.onnx",
        "onnx/pruned/position_embedding.onnx",
    ):
        assert (work_dir / name).stat().st_size > 0, name
    assert json.loads((work_dir / "report.json").read_text()) == json.loads(json.dumps(report))
    assert report["weights"] == "random" and report["solver"]["status"] == "optimal"
    page = (work_dir / "report.html").read_text()
    assert "Random weights" in page and report["plan_hash"] in page and "Not shown" not in page
    assert report["interpolated_entries"] == 0
    assert 0 < report["importance_kept"] < 1
    dense, pruned = report["dense"], report["pruned"]
    assert pruned["params"] < dense["params"] and pruned["macs"] < dense["macs"]
    assert pruned["predicted_ms"] <= report["reference_budget_ms"] * (1 + 1e-9)
    for name in ("dense", "pruned"):
        assert report["differences"][name]["logits"] < 1e-3 and report["differences"][name]["boxes"] < 1e-2
    plan = PruningPlan.load(work_dir / "plan.json")
    assert plan.hash == report["plan_hash"] and (plan.cuts or plan.removed)
    problem = PruningProblem.load(work_dir / "problem.npz")
    assert problem.metrics == ("latency_ms",)
    assert not list(work_dir.glob("onnx/network*"))


def test_another_budget_reuses_importance_and_table(run, config):
    work_dir, first = run
    before = {n: (work_dir / n).stat().st_mtime_ns for n in ("importance.npz", "whole_latency.json")}
    report = make_job(config, work_dir, budget=0.75).run()
    assert {n: (work_dir / n).stat().st_mtime_ns for n in before} == before
    assert report["importance_kept"] > first["importance_kept"]
    assert report["plan_hash"] != first["plan_hash"]


def test_pruned_model_loads_and_predicts(run):
    """The README's three lines, in a fresh process."""
    work_dir, _ = run
    code = (
        f"from mmdet3d.apis import init_model; from mmengine.runner import Runner\n"
        f"model = init_model('{work_dir}/pruned_config.py', '{work_dir}/pruned.pth', device='cpu')\n"
        f"print(len(model.test_step(next(iter(Runner.build_dataloader(model.cfg.test_dataloader))))[0]"
        f".pred_instances_3d.scores_3d))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    assert int(out.stdout.splitlines()[-1]) > 0


def test_a_pruned_model_is_pruned_again_and_needs_nothing_of_the_first_run(run, tmp_path):
    work_dir, _ = run
    first = json.loads((work_dir / "report.json").read_text())  # other tests prune there, too
    shutil.copytree(work_dir, tmp_path / "first", ignore=shutil.ignore_patterns("*.onnx", ".lock"))
    config = read_config(tmp_path / "first" / "pruned_config.py")
    with pytest.raises(MdpError, match="would be overwritten; give another --work-dir"):
        make_job(config, tmp_path / "first").run()
    less = dict(budget=0.8, importance="taylor", repair=False)  # three frames are too few for losses
    settings = PruneSettings.from_config({**config.prune, **less})
    report = PruneJob(config, settings, tmp_path / "second", config.checkpoint, Console(quiet=True)).run()
    assert report["dense"]["params"] == first["pruned"]["params"] > report["pruned"]["params"]
    shutil.rmtree(tmp_path / "first")
    again = (tmp_path / "second").rename(tmp_path / "moved")
    config = read_config(again / "pruned_config.py")
    model, _ = adapter_of(config, settings.input_shape, settings.adapter).build(config.checkpoint)
    unused = StreamPETRAdapter.training_only
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith(unused)) == report["pruned"]["params"]


def test_impossible_and_needless_budgets(run, config):
    work_dir, _ = run
    with pytest.raises(InfeasibleBudgetError) as error:
        make_job(config, work_dir, budget="0.001ms").run()
    assert error.value.minimum > 0.001
    reachable = float(re.search(r"Raise the budget to ([\d.]+) ms", str(error.value))[1])
    assert error.value.minimum <= reachable <= error.value.minimum + 0.001
    assert "prune.min_keep" in str(error.value) and "1 thread" in str(error.value)
    with pytest.raises(MdpError, match="not below the dense latency"):
        make_job(config, work_dir, budget="100000ms").run()


def test_work_dir_of_another_model_is_refused(run, config):
    work_dir, _ = run
    other = Config(config.to_dict())
    other.model.pts_bbox_head.decoder.ffn_hidden_dims = 256
    with pytest.raises(StructureMismatchError, match="another model; give another --work-dir"):
        make_job(other, work_dir).run()


@pytest.mark.parametrize("name", ["latency_table.json", "importance.npz", "whole_latency.json", "space.json"])
def test_truncated_files_are_named(run, config, name):
    work_dir, _ = run
    path = work_dir / name
    content = path.read_bytes()
    try:
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(FileFormatError, match=name.replace(".", r"\.")):
            make_job(config, work_dir).run()
        assert path.read_bytes() == content[: len(content) // 2]
    finally:
        path.write_bytes(content)


def test_command_line_errors_have_status_2(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("prune_tool", "tools/prune.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def prune(*args):
        monkeypatch.setattr(sys, "argv", ["prune.py", *args, "--work-dir", str(tmp_path / "w")])
        return tool.main(), " ".join(capsys.readouterr().out.split())

    code, out = prune("configs/nothing.py")
    assert code == 2 and "configs/nothing.py does not exist" in out
    code, out = prune("configs/streampetr_mdp.py", "--budget", "soon")
    assert code == 2 and "budget 'soon' is not understood" in out
    code, out = prune("configs/streampetr_mdp.py", "--cfg-options", "prune.budgett=0.5")
    assert code == 2 and "did you mean 'budget'" in out
    code, out = prune("configs/streampetr_mdp.py", "--checkpoint", str(tmp_path / "no.pth"))
    assert code == 2 and "no.pth does not exist" in out
    missing = ["importance_dataloader.dataset.data_root=" + str(tmp_path / "nowhere")]
    code, out = prune("configs/streampetr_mdp.py", "--cfg-options", *missing)
    assert code == 2 and "create_mini_nuscenes.py" in out and "NUSCENES_ROOT" in out
    assert [path.name for path in tmp_path.glob("w/*")] in ([], [".lock"])
