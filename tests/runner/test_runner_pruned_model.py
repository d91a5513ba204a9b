"""Pruned models from configs: equal outputs after a round trip, strict loading, the plan in checkpoints."""

import copy

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner, load_checkpoint

from mdp_mmdet3d.adapters import InputShape, adapter_of, trace_space
from mdp_mmdet3d.config_file import without_pretrained
from mdp_mmdet3d.errors import FileFormatError, StructureMismatchError
from mdp_mmdet3d.runner import PlanHook
from mdp_mmdet3d.runner.outputs import save_pruned_checkpoint, write_pruned_config
from mdp_mmdet3d.runner.plan_hook import META_KEY
from mdp_mmdet3d.surgery.apply import apply_plan
from mdp_mmdet3d.surgery.plan import PruningPlan

CLASSES = ["car", "truck"]


@pytest.fixture
def plans(tiny_model, random_kept):
    space = trace_space(tiny_model, InputShape(6, 64, 176))
    return [PruningPlan.from_kept(space, *random_kept(space, np.random.default_rng(seed))) for seed in (0, 1)]


@pytest.fixture
def run_dir(tiny_model, tiny_config, plans, tmp_path):
    """What tools/prune.py leaves behind, for the tiny model."""
    pruned = apply_plan(copy.deepcopy(tiny_model), plans[0])
    plans[0].save(tmp_path / "plan.json")
    save_pruned_checkpoint(tmp_path / "pruned.pth", pruned, plans[0], "random", CLASSES)
    config = Config(
        dict(
            model=tiny_config().to_dict(),
            default_scope="mmdet3d",
            prune=dict(budget=0.5, frames=8, input_size=(64, 176), adapter=dict(type="StreamPETRAdapter")),
            custom_imports=dict(imports=["projects.streampetr"], allow_failed_imports=False),
        )
    )
    write_pruned_config(tmp_path / "pruned_config.py", config)
    return tmp_path, pruned


def build(run_dir):
    from mmengine.registry import MODELS, init_default_scope

    config = Config.fromfile(run_dir / "pruned_config.py")
    init_default_scope("mmdet3d")
    return MODELS.build(config.model)


def predict(model, batch):
    model.eval().reset_memory()
    with torch.no_grad():
        return model(**model.data_preprocessor(dict(batch), False), mode="tensor")["all_cls_scores"]


def test_reloaded_model_gives_equal_outputs(run_dir, tiny_frames, tmp_path_factory):
    folder, pruned = run_dir
    # The folder can be moved: the config looks for the plan beside itself.
    moved = tmp_path_factory.mktemp("elsewhere") / "run"
    folder.rename(moved)
    model = build(moved)
    load_checkpoint(model, str(moved / "pruned.pth"), map_location="cpu")
    assert type(model).__name__ == "StreamPETR"
    batch = tiny_frames(1)[0]
    assert torch.equal(predict(model, batch), predict(pruned, batch))


def test_pruned_config_is_a_plain_config(run_dir):
    config = Config.fromfile(run_dir[0] / "pruned_config.py")
    assert config.model.type == "MDPPrunedModel"
    assert config.load_from == config.checkpoint == str(run_dir[0] / "pruned.pth")
    # What the tools need again to deploy it, or to prune it again; the budget is spent.
    assert config.prune == dict(frames=8, input_size=(64, 176), adapter=dict(type="StreamPETRAdapter"))
    assert type(adapter_of(config, InputShape(0, 64, 176), config.prune.adapter)).__name__ == "StreamPETRAdapter"
    assert {"type": "PlanHook"} in [dict(h) for h in config.custom_hooks]
    assert config.custom_imports["imports"] == ["projects.streampetr", "mdp_mmdet3d.runner"]


def test_dense_or_other_checkpoint_is_refused_by_name_and_shape(run_dir, tiny_model, plans, tmp_path):
    folder = run_dir[0]
    torch.save({"state_dict": tiny_model.state_dict(), "meta": {}}, tmp_path / "dense.pth")
    with pytest.raises(StructureMismatchError, match=r"expected \(\d+.*found \(\d+") as error:
        load_checkpoint(build(folder), str(tmp_path / "dense.pth"), map_location="cpu", strict=False)
    assert "more" in str(error.value)
    other = apply_plan(copy.deepcopy(tiny_model), plans[1])
    save_pruned_checkpoint(tmp_path / "other.pth", other, plans[1], "random", CLASSES)
    with pytest.raises(StructureMismatchError, match="another plan or is dense"):
        load_checkpoint(build(folder), str(tmp_path / "other.pth"), map_location="cpu")


def test_missing_key_is_refused(run_dir):
    model = build(run_dir[0])
    state = model.state_dict()
    name = next(iter(state))
    state.pop(name)
    with pytest.raises(StructureMismatchError, match=f"{name}: .*found nothing"):
        model.load_state_dict(state)


def test_hook_writes_and_checks_the_plan(run_dir, plans):
    class FakeRunner:
        model = build(run_dir[0])
        _load_from, _resume = "x.pth", False

    checkpoint = {"state_dict": FakeRunner.model.state_dict()}
    hook = PlanHook()
    hook.before_save_checkpoint(FakeRunner, checkpoint)
    assert PruningPlan.from_dict(checkpoint["meta"][META_KEY]).hash == plans[0].hash
    hook.after_load_checkpoint(FakeRunner, checkpoint)
    checkpoint["meta"][META_KEY]["hash"] = plans[1].hash
    with pytest.raises(StructureMismatchError, match=r"x\.pth was saved with plan"):
        hook.after_load_checkpoint(FakeRunner, checkpoint)


def test_damaged_plan_is_refused(run_dir):
    path = run_dir[0] / "plan.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(FileFormatError, match="truncated"):
        build(run_dir[0])


def test_pretrained_weights_of_the_dense_model_are_ignored():
    config = dict(
        a=dict(init_cfg=dict(type="Pretrained", checkpoint="x"), depth=50),
        pretrained="y",
        b=[dict(init_cfg=dict(type="Xavier"))],
    )
    assert without_pretrained(config) == dict(a=dict(depth=50), b=[dict(init_cfg=dict(type="Xavier"))])
    heads = without_pretrained(ConfigDict(head=dict(train_cfg=dict(assigner=[dict(type="A")]))))
    assert heads.head.train_cfg.assigner[0].type == "A"  # lidar heads read their settings as attributes


def test_a_runner_trains_saves_and_resumes_the_pruned_model(run_dir, tiny_frames, tmp_path, plans):
    """MMEngine's runner builds the optimizer, loads and saves a pruned model without knowing it is one."""
    from torch.utils.data import DataLoader

    config = Config.fromfile(run_dir[0] / "pruned_config.py")
    frames = tiny_frames(2)
    loader = DataLoader(frames, batch_size=1, collate_fn=lambda items: items[0])

    def make(**options):
        return Runner(
            model=config.model,
            work_dir=str(tmp_path / "work"),
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=1),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=1e-6)),
            custom_hooks=config.custom_hooks,
            default_scope="mmdet3d",
            experiment_name=f"pruned{len(options)}",
            log_level="WARNING",
            **options,
        )

    runner = make(load_from=config.load_from)
    runner.train()
    saved = torch.load(tmp_path / "work" / "epoch_1.pth", weights_only=False)
    assert saved["meta"][META_KEY]["hash"] == plans[0].hash
    resumed = make(load_from=str(tmp_path / "work" / "epoch_1.pth"), resume=True)
    resumed.load_or_resume()
    assert resumed.iter == 2
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, saved["state_dict"][name])
