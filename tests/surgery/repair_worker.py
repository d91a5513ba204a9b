"""One process of a distributed repair: ``repair_worker.py RANK WORLD FOLDER`` writes ``FOLDER/WORLD-RANK.pth``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from repair_nets import cut, setting, state_of, weighted

from mdp_mmdet3d.surgery.repair import RepairSettings, RepairStore, repair

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)
model, plan, frames, _ = setting()
pruned = cut(model, plan)
store = RepairStore(folder / f"store{world}", {}, writes=rank == 0)
report = repair(model, pruned, plan, weighted(frames), RepairSettings(positions=500), store=store)
torch.save((state_of(pruned), report.to_dict()), folder / f"{world}-{rank}.pth")
dist.destroy_process_group()
