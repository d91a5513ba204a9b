"""Single-precision training that survives a batch whose gradients are not finite."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.logging import MessageHub, print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

SKIPPED = "skipped_steps"


@OPTIM_WRAPPERS.register_module()
class FiniteOptimWrapper(OptimWrapper):
    """Leaves out optimizer steps with NaN or infinite gradients, and counts them (``skipped_steps`` in the log).

    Mixed precision does the same through its loss scaler. Under DDP all processes decide alike, as they share their
    gradients. The count survives resuming.
    """

    skipped_steps = 0

    def step(self, **kwargs: Any) -> None:
        """Step, unless a gradient is not finite."""
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients and not bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all()):
            self.skipped_steps += 1
            MessageHub.get_current_instance().update_scalar("train/skipped_steps", self.skipped_steps)
            print_log(f"gradients are not finite: step left out ({self.skipped_steps} so far)", "current", level=30)
            return
        super().step(**kwargs)

    def state_dict(self) -> dict:
        """The optimizer's state and the count."""
        return {**super().state_dict(), SKIPPED: self.skipped_steps}

    def load_state_dict(self, state_dict: dict) -> None:
        """Go on with what `state_dict` returned."""
        state = dict(state_dict)
        self.skipped_steps = state.pop(SKIPPED, 0)
        super().load_state_dict(state)
