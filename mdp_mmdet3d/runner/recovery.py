"""Steps after pruning that a config may ask for: accuracy on the validation set, fine-tuning of the pruned model.

Both run MMEngine's ordinary Runner and keep their result with its identity: done once, it is read from then on.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from torch import Tensor, nn

from mdp_mmdet3d.datasets.identity import data_identity
from mdp_mmdet3d.errors import FileFormatError, MdpError
from mdp_mmdet3d.files import digest, read_json, write_json
from mdp_mmdet3d.progress import PlainProgress, step_bar
from mdp_mmdet3d.runner.cpu_processes import prepare_cpu_processes
from mdp_mmdet3d.runner.settings import FinetuneSettings
from mdp_mmdet3d.runner.train_config import add_optional_hooks, choose_start
from mdp_mmdet3d.surgery.plan import PruningPlan

SCHEMA_VERSION = 1


def model_identity(config: Config, weights: str, plan_hash: str | None) -> dict[str, Any]:
    """What accuracy and fine-tuning of a model depend on, besides the settings of the step itself.

    Args:
        config: The dense config.
        weights: Identity of the dense weights (`Adapter.build`).
        plan_hash: Of the plan that was cut out; None for the dense model.
    """
    parts = {
        key: config.get(key)
        for key in (
            "model",
            "train_dataloader",
            "test_dataloader",
            "test_evaluator",
            "optim_wrapper",
            "custom_hooks",
            "ema",
            "distillation",
        )
    }
    found = {
        key: data_identity((config.get(key) or {}).get("dataset") or {}).partition("@")[2]
        for key in ("train_dataloader", "test_dataloader")
    }
    infos = {key: sha256 for key, sha256 in found.items() if sha256}
    return {"weights": weights, "plan": plan_hash, "config": digest(Config(parts).to_dict()), "data": infos}


def evaluate(
    config: Config,
    state: Mapping[str, Tensor],
    path: Path,
    identity: Mapping[str, Any],
    console: Console,
    headline: Sequence[str],
) -> dict[str, Any]:
    """Evaluate a model on ``config.test_dataloader``, or read what an earlier run found.

    Args:
        config: Of the dense or of the pruned model.
        state: Its weights.
        path: JSON file of the result; what the devkit prints goes into a log beside it.
        identity: What the result depends on (`model_identity`).
        console: Shows the progress.
        headline: Names of the metrics that stand for accuracy, without the evaluator's prefix; of nuScenes' those over
            the classes of the data set, where the evaluator is ``ClassSetNuScenesMetric``. Empty: all numbers.

    Returns:
        ``figures``: the headline metrics; ``metrics``: all that the evaluator returned.

    Raises:
        MdpError: The config cannot evaluate, or its evaluator does not give these figures.
    """
    if (result := _kept(path, identity, "accuracy")) is not None:
        console.print(f"  reused: {path}")
        # Files of earlier releases hold the headline metrics beside the others.
        return result if "figures" in result else {**result, "figures": {name: result[name] for name in headline}}
    if any(config.get(key) is None for key in ("test_dataloader", "test_cfg", "test_evaluator")):
        raise MdpError("prune.evaluate needs test_dataloader, test_cfg and test_evaluator in the config")
    folder = path.with_suffix("")
    config = _quiet(config, folder)
    for key in (
        "train_dataloader",
        "train_cfg",
        "optim_wrapper",
        "param_scheduler",
        "val_dataloader",
        "val_cfg",
        "val_evaluator",
    ):
        config[key] = None
    config.custom_hooks = [hook for hook in config.get("custom_hooks") or () if hook["type"] == "PlanHook"]
    with _runner(config, folder, console) as runner:
        runner.model.load_state_dict(state)
        runner.register_hook(_Bar(console, "evaluation", len(runner.test_dataloader), "batches"))
        metrics = {
            key: float(value) for key, value in runner.test().items() if isinstance(value, (int, float, np.number))
        }
    result = {
        "schema_version": SCHEMA_VERSION,
        "identity": dict(identity),
        "figures": _figures(metrics, headline),
        "metrics": {key: None if math.isnan(value) else value for key, value in metrics.items()},
    }
    write_json(path, result)
    return result


def finetune(
    config: Config,
    checkpoint: Path,
    folder: Path,
    settings: FinetuneSettings,
    identity: Mapping[str, Any],
    console: Console,
) -> Path:
    """Train a model on ``config.train_dataloader`` for a few steps; goes on where an earlier run stopped.

    Args:
        config: Of the dense or of the pruned model, with optimizer, training data and an iteration-based loop.
        checkpoint: The weights to start from.
        folder: Where training state and result lie.
        settings: How long and how.
        identity: What the result depends on (`model_identity`).
        console: Shows the progress.

    Returns:
        Path of the last checkpoint, ``folder/finetuned.pth``.

    Raises:
        MdpError: The config cannot train by iterations.
    """
    identity = {**identity, **asdict(settings)}
    done, target = folder / "finetune.json", folder / "finetuned.pth"
    if target.is_file() and _kept(done, identity, "fine-tuning") is not None:
        console.print(f"  reused: {target}")
        return target
    check_trainable(config)
    begun = folder / "identity.json"
    if _kept(begun, identity, "fine-tuning in progress") is None:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(begun, {"schema_version": SCHEMA_VERSION, "identity": identity})
    config = _quiet(config, folder)
    add_optional_hooks(config)
    config.load_from = str(checkpoint)
    choose_start(config, "auto")
    config.randomness = dict(seed=settings.seed)
    config.optim_wrapper.optimizer.lr = settings.lr
    rise = min(settings.warmup, settings.iterations // 2)
    config.param_scheduler = [
        dict(
            type="CosineAnnealingLR",
            T_max=settings.iterations - rise,
            eta_min=0.0,
            begin=rise,
            end=settings.iterations,
            by_epoch=False,
        )
    ]
    if rise:
        config.param_scheduler.insert(0, dict(type="LinearLR", start_factor=0.1, begin=0, end=rise, by_epoch=False))
    config.train_cfg.update(max_iters=settings.iterations, val_interval=settings.iterations + 1)
    config.default_hooks = {
        **config.get("default_hooks", {}),
        "checkpoint": dict(type="CheckpointHook", by_epoch=False, interval=settings.save_interval, max_keep_ckpts=2),
    }
    for key in ("val_dataloader", "val_cfg", "val_evaluator", "test_dataloader", "test_cfg", "test_evaluator"):
        config[key] = None
    start = time.perf_counter()
    with _runner(config, folder, console) as runner:
        runner.register_hook(_Bar(console, "fine-tuning", settings.iterations, "iterations"))
        if settings.keep_statistics:
            runner.register_hook(_KeptStatistics())
        runner.train()
        runner.save_checkpoint(str(folder), target.name, save_optimizer=False, save_param_scheduler=False)
    write_json(done, {"schema_version": SCHEMA_VERSION, "identity": identity, "seconds": time.perf_counter() - start})
    for path in folder.glob("iter_*.pth"):
        path.unlink()
    (folder / "last_checkpoint").unlink(missing_ok=True)
    return target


def recover(
    config: Config,
    work_dir: Path,
    *,
    headline: Sequence[str],
    evaluate_models: bool,
    settings: FinetuneSettings | None,
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    weights: str,
    console: Console,
    steps: Callable[..., AbstractContextManager[None]],
    raw: nn.Module | None = None,
    repair: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The steps of a pruning job after the cut, as far as its config asks for them.

    Args:
        config: The dense config.
        work_dir: Holds ``pruned.pth`` and ``pruned_config.py``.
        headline: As for `evaluate`.
        evaluate_models: Whether to evaluate the dense, the pruned and, if there is one, the fine-tuned model.
        settings: How to fine-tune; None not to.
        dense: The dense model with its weights.
        pruned: The pruned model with its weights.
        plan: What was cut.
        weights: Identity of the dense weights.
        console: Shows the progress.
        steps: Announces and times a step.
        raw: The pruned model before repair, if ``pruned`` is repaired.
        repair: What the repaired weights depend on (`repair_identity`).

    Returns:
        For the report: ``accuracy`` (headline metrics of ``dense``, ``pruned`` as it was cut, ``repaired``,
        ``finetuned``) and ``finetune`` (its settings and checkpoint), where asked for.
    """
    report: dict[str, Any] = {}
    pruned_config = Config.fromfile(work_dir / "pruned_config.py")
    pruned_identity = model_identity(config, weights, plan.hash)

    def judge(name: str, what: str, config: Config, state: Mapping[str, Tensor], identity: Mapping[str, Any]) -> None:
        if not evaluate_models:
            return
        with steps("evaluate", f"accuracy of {what} on the test data"):
            path = work_dir / "accuracy" / f"{name}.json"
            figures = evaluate(config, state, path, identity, console, headline)["figures"]
            report.setdefault("accuracy", {})[name] = figures
            console.print(f"  {name}: " + ", ".join(f"{figure} {value:.3f}" for figure, value in figures.items()))

    judge("dense", "the dense model", config, dense.state_dict(), model_identity(config, weights, None))
    judge(
        "pruned",
        "the pruned model as it was cut",
        pruned_config,
        (pruned if raw is None else raw).state_dict(),
        pruned_identity,
    )
    if repair is not None:
        pruned_identity = {**pruned_identity, "repair": dict(repair)}
        judge("repaired", "the repaired model", pruned_config, pruned.state_dict(), pruned_identity)
    if settings is not None:
        with steps("fine-tune"):
            path = finetune(
                pruned_config, work_dir / "pruned.pth", work_dir / "finetune", settings, pruned_identity, console
            )
            console.print(f"  {settings.iterations} iterations: {path}")
        report["finetune"] = {**asdict(settings), "checkpoint": str(path.relative_to(work_dir))}
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        judge(
            "finetuned", "the fine-tuned model", pruned_config, state, {**pruned_identity, "finetune": asdict(settings)}
        )
    return report


class _KeptStatistics(Hook):
    """Batch norms in evaluation mode: they use the statistics that they have, and keep them. Their weights train."""

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """The loop put the whole model into training mode."""
        for module in runner.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()


class _Bar(Hook):
    """Steps of a training or test on a progress bar, or a line now and then where there is no terminal."""

    def __init__(self, console: Console, name: str, total: int, unit: str) -> None:
        self.progress = step_bar(console)
        self.task = self.progress.add_task(name, total=total)
        self.lines: PlainProgress | None = None
        self.about = (console, name, total, unit)

    def before_run(self, runner: Runner) -> None:
        """Show the bar."""
        self.progress.start()

    def after_run(self, runner: Runner) -> None:
        """Take it away."""
        self.progress.stop()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move on."""
        self._done(runner.iter + 1)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Move on."""
        self._done(batch_idx + 1)

    def _done(self, count: int) -> None:
        if self.lines is None:  # a training that goes on does not begin at 0
            self.lines = PlainProgress(*self.about, done=count - 1)
        self.progress.update(self.task, completed=count)
        self.lines(count)


def _quiet(config: Config, folder: Path) -> Config:
    config = copy.deepcopy(config)
    config.work_dir = str(folder)
    config.experiment_name = f"{folder.name}-{time.time_ns()}"  # MMEngine keeps loggers by this name
    config.log_level = "WARNING"
    config.launcher = "none"
    config.load_from, config.resume = None, False
    return config


@contextmanager
def _runner(config: Config, folder: Path, console: Console) -> Iterator[Runner]:
    """A runner whose printing, and that of the devkit, goes to a file; ``console`` keeps the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare_cpu_processes(config)
    with (folder / "printed.log").open("a", encoding="utf-8") as log, _redirected(log.fileno(), console):
        yield Runner.from_cfg(config)


@contextmanager
def _redirected(target: int, console: Console) -> Iterator[None]:
    """Send what this process prints elsewhere, by file descriptor: MMEngine's bars hold ``sys.stdout`` itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    terminal = os.fdopen(os.dup(1), "w", encoding="utf-8") if console.file is sys.stdout else None
    if terminal is not None:
        console.file = terminal
    try:
        os.dup2(target, 1)
        os.dup2(target, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy_of in enumerate(saved, start=1):
            os.dup2(copy_of, descriptor)
            os.close(copy_of)
        if terminal is not None:
            console.file = sys.stdout
            terminal.close()


def check_trainable(config: Config) -> None:
    """Raise `MdpError` where a config cannot train by iterations."""
    for key in ("train_dataloader", "optim_wrapper", "train_cfg"):
        if config.get(key) is None:
            raise MdpError(
                f"prune.finetune needs {key} in the config; prune a training config, e.g. "
                "configs/streampetr/streampetr_r50_704x256_428q_24e.py"
            )
    if "max_iters" not in config.train_cfg:
        raise MdpError(
            f"prune.finetune counts iterations, but train_cfg is {dict(config.train_cfg)}; use "
            "StreamTrainLoop or IterBasedTrainLoop, or train pruned_config.py with tools/train.py"
        )


def _figures(metrics: Mapping[str, float], headline: Sequence[str]) -> dict[str, float]:
    figures = {}
    for name in headline or [key for key, value in metrics.items() if not math.isnan(value)]:
        ends = (f"/{name}_set", f"/{name}")
        found = [metrics[key] for end in ends for key in metrics if key.endswith(end) or key == name]
        if not found:
            raise MdpError(
                f"prune.evaluate: the config's test_evaluator gave no {name}, only "
                f"{', '.join(list(metrics)[:5])}; give it a metric that does"
            )
        figures[name] = found[0]
    return figures


def _kept(path: Path, identity: Mapping[str, Any], what: str) -> dict[str, Any] | None:
    """Content of a result file if it is of this identity."""
    if not path.is_file():
        return None
    data = read_json(path, what=what, schema_version=SCHEMA_VERSION)
    if "identity" not in data:
        raise FileFormatError(f"{what} {path} has no identity; delete it and run again")
    return data if data["identity"] == identity else None
