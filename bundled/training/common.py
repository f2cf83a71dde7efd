"""What the training scripts share: resumable checkpoints, weight averaging, the Muon optimizer, logs."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

# The bundled model that ``emoji-video`` starts from.
EMOJI_T2I = Path(__file__).parents[1] / "src" / "ditq_bundled" / "models" / "emoji-t2i"


class Ema:
    """Exponential moving average of parameters, with the usual warm-up of the decay."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.modules = modules
        self.shadow = {key: p.detach().clone().float() for key, p in self._named() if p.requires_grad}

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for prefix, module in self.modules.items():
            for name, p in module.named_parameters():
                yield f"{prefix}.{name}", p

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for key, p in self._named():
            if key in self.shadow:
                self.shadow[key].lerp_(p.detach().float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, modules: dict[str, nn.Module]) -> None:
        for prefix, module in modules.items():
            for name, p in module.named_parameters():
                if f"{prefix}.{name}" in self.shadow:
                    p.copy_(self.shadow[f"{prefix}.{name}"])


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024), for the hidden matrices.

    Stacks matrices of one shape so that a step costs a few batched products. Everything that is
    not a hidden matrix belongs to AdamW.
    """

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state["momentum"], group["momentum"]))
                # The 0.2 sqrt(max) factor gives an update the size AdamW would take.
                scale = 0.2 * math.sqrt(max(shape))
                for p, u in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u.to(p.dtype), alpha=-group["lr"] * scale)


def orthogonalise(g: torch.Tensor, steps: int = 4) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of a stack ``g`` [B, M, N], approximately."""
    x = g.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


class Run:
    """One resumable training run: its folder, its log and its checkpoint."""

    def __init__(
        self, folder: Path, modules: dict[str, nn.Module], optimizers: list[torch.optim.Optimizer], ema: Ema | None
    ) -> None:
        self.folder, self.modules, self.optimizers, self.ema = folder, modules, optimizers, ema
        self.step, self.log = 0, []
        self.started = time.time()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "checkpoint.pt"
        if path.exists():
            state = torch.load(path, weights_only=True)
            self.step, self.log = state["step"], state["log"]
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            if ema is not None:
                ema.shadow = state["ema"]
            print(f"resumed {folder} at step {self.step}", flush=True)

    def save(self) -> None:
        temporary = self.folder / "checkpoint.tmp"
        torch.save(
            {
                "step": self.step,
                "log": self.log,
                "modules": {name: m.state_dict() for name, m in self.modules.items()},
                "optimizers": [o.state_dict() for o in self.optimizers],
                "ema": None if self.ema is None else self.ema.shadow,
            },
            temporary,
        )
        os.replace(temporary, self.folder / "checkpoint.pt")
        (self.folder / "log.json").write_text(json.dumps(self.log))

    def record(self, **values: float) -> None:
        values = {"step": self.step, "minutes": round((time.time() - self.started) / 60, 2), **values}
        self.log.append({k: round(v, 5) for k, v in values.items()})
        print(" ".join(f"{k}={v:.5g}" for k, v in self.log[-1].items()), flush=True)


def schedule(step: int, total: int, warmup: int = 100, final: float = 0.05) -> float:
    """Learning rate factor: linear warm-up, flat, then linear to ``final`` over the last 40 %."""
    if step < warmup:
        return (step + 1) / warmup
    begin = 0.6 * total
    return 1.0 if step < begin else 1.0 - (1.0 - final) * min(1.0, (step - begin) / (total - begin))
