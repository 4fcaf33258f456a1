"""AdamW for the CPU platform with what megatron-core's distributed optimizer asks of Transformer Engine's FusedAdam."""

from __future__ import annotations

from typing import Any

import torch


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW with one step counter per parameter group and fp32 moments, as Transformer Engine's FusedAdam.

    torch's own keeps a ``step`` tensor per parameter, with which megatron-core's ``DistributedOptimizer``
    can save a checkpoint but not load one. Update: decoupled weight decay (Loshchilov and Hutter,
    arXiv 1711.05101, algorithm 2) with bias correction.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **_: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "megatron-core passes no closure"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            beta1, beta2 = group["betas"]
            torch.optim._functional.adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # the function increments the counters it is given; ours is the group's, so hand it copies
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                foreach=False,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
