"""How every model of a comparison is fine-tuned."""

from __future__ import annotations

from dataclasses import replace

from mdp_mmdet3d.config_file import read_config
from mdp_mmdet3d.errors import MdpError
from mdp_mmdet3d.runner.settings import AUTO, FinetuneSettings, PruneSettings

SHARE = 0.1  # of the learning rate of training


def finetune_settings(config_path: str, iterations: int | None, lr: float | None) -> FinetuneSettings | None:
    """The config's ``prune.finetune`` with the command line's overrides; None: no fine-tuning.

    Args:
        config_path: The dense config.
        iterations: Optimizer steps; None: as the config says, 0: none.
        lr: Learning rate; None: the config's, without ``prune.finetune`` a tenth of that of training.

    Raises:
        MdpError: A value makes no sense, or the config tells no learning rate.
    """
    config = read_config(config_path)
    pruning = PruneSettings.from_config(config.get("prune", {}))
    settings = pruning.finetuning
    if pruning.finetune == AUTO and iterations is None:
        raise MdpError(
            f"{config_path}: prune.finetune = 'auto' trains plans by their shares; a comparison trains all of them "
            "alike: give --finetune N (0: none)"
        )
    if iterations == 0 or (iterations is None and settings is None):
        return None
    if settings is None:
        training = ((config.get("optim_wrapper") or {}).get("optimizer") or {}).get("lr")
        rate = lr if training is None or lr is not None else training * SHARE
        if rate is None:
            raise MdpError(f"{config_path} has no optim_wrapper.optimizer.lr: give --lr, or set prune.finetune")
        settings = FinetuneSettings(iterations or 0, lr=rate)
    if iterations is not None:
        settings = replace(settings, iterations=iterations)
    if lr is not None:
        settings = replace(settings, lr=lr)
    return FinetuneSettings.from_config(vars(settings))
