"""AdamW for the CPU platform with what megatron-core asks of Transformer Engine's FusedAdam.

Two things of FusedAdam are kept to: its interface, which megatron-core's distributed optimizer calls, and its
rules for moments and master weights in fewer bits, so that such runs train, save and resume on a CPU.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

MASTER = "master_param"
MOMENTS = ("exp_avg", "exp_avg_sq")
# By the name of the format: how it is stored, the number that its largest value is scaled to, bits of its
# significand. Transformer Engine names FP8 by uint8; half of fp16's range is its margin.
_SCALED = {
    torch.uint8: (torch.float8_e4m3fn, 448.0, 4),
    torch.float16: (torch.float16, torch.finfo(torch.float16).max / 2, 11),
}


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW with one step counter per parameter group, as Transformer Engine's FusedAdam.

    torch's own keeps a ``step`` tensor per parameter, with which megatron-core's ``DistributedOptimizer``
    can save a checkpoint but not load one. Update: decoupled weight decay (Loshchilov and Hutter,
    arXiv 1711.05101, algorithm 2) with bias correction, computed in fp32 whatever the formats.

    Formats, by FusedAdam's rules (2.11): moments in fp32, bf16, fp16 or FP8 E4M3 (``uint8`` here), master
    weights in fp32 or fp16; fp16 and FP8 with one fp32 scale per tensor, taken at each step from its largest
    absolute value; each step goes from the stored values to fp32 and back. ``use_decoupled_grad``: gradients
    are read from ``decoupled_grad``, which may be bf16. ``state_dict`` holds unscaled fp32 values, so the
    formats of a checkpoint do not bind those of the run that goes on from it.

    Emulated, with a difference: FP8 is stored as ``torch.float8_e4m3fn`` and rounded by torch; a scale has as
    many bits less as its format's values have, so that value x scale is exact and a state that is
    saved and loaded is the same to the bit (FusedAdam's may differ in the last bit of the scale). Not
    there: int16 remainders of master weights, whose checkpoints no other format could read.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        adam_w_mode: bool = True,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
    ) -> None:
        if not adam_w_mode or store_param_remainders:
            raise NotImplementedError("the CPU platform has AdamW without stored remainders only")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.master_weights = master_weights
        self.use_decoupled_grad = use_decoupled_grad
        self._formats = {
            "exp_avg": exp_avg_dtype,
            "exp_avg_sq": exp_avg_sq_dtype,
            MASTER: master_weight_dtype,
        }
        self._in_fp32 = not master_weights and set(self._formats.values()) == {torch.float32}
        self._scales: dict[tuple[torch.Tensor, str], torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "megatron-core passes no closure"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if self._gradient(p) is not None]
            for p in params:
                if not self.state[p]:
                    self.initialize_state(p)
            states = [{name: self.get_unscaled_state(p, name) for name in self.state[p]} for p in params]
            weights = [state.get(MASTER, p) for p, state in zip(params, states, strict=True)]
            beta1, beta2 = group["betas"]
            torch.optim._functional.adamw(
                weights,
                [self._gradient(p).float() for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
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
            if self._in_fp32:  # updated where they stand
                continue
            for p, weight, state in zip(params, weights, states, strict=True):
                if weight is not p:
                    p.copy_(weight)
                for name, value in state.items():
                    self.set_scaled_state(p, name, value)

    def _gradient(self, param: torch.Tensor) -> Any:
        return getattr(param, "decoupled_grad", None) if self.use_decoupled_grad else param.grad

    def initialize_state(self, param: torch.Tensor, store_param_remainders: bool = False) -> None:
        """Moments of zero and, where it is kept here, the master weight."""
        for name in MOMENTS:
            self.set_scaled_state(param, name, torch.zeros_like(param, dtype=torch.float32))
        if self.master_weights:
            self.set_scaled_state(param, MASTER, param.detach().float().clone())

    def get_unscaled_state(self, param: torch.Tensor, name: str) -> torch.Tensor:
        """One state of a parameter in fp32: the stored tensor itself where it is fp32, else a new one."""
        stored = self.state[param][name].float()
        scale = self._scales.get((param, name))
        return stored if scale is None else stored * scale

    @torch.no_grad()
    def set_scaled_state(self, param: torch.Tensor, name: str, value: torch.Tensor) -> None:
        """Store an fp32 ``value`` as one state of a parameter, in its format."""
        assert value.dtype is torch.float32, value.dtype
        state, dtype = self.state[param], self._formats[name]
        if dtype in _SCALED:
            dtype, largest, bits = _SCALED[dtype]
            scale = _rounded(value.abs().max() / largest, 24 - bits)
            self._scales[param, name] = scale
            value = torch.where(scale > 0, value / scale, 0.0)
        if name not in state:
            state[name] = value.to(dtype)
        elif state[name] is not value:
            state[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """torch's, with every state unscaled and in fp32."""
        result = super().state_dict()
        for index, param in enumerate(self._in_order()):
            if index in result["state"]:
                result["state"][index] = {
                    name: self.get_unscaled_state(param, name) for name in result["state"][index]
                }
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of :meth:`state_dict`, each into its format."""
        # torch's own would cast every state to the format of its parameter
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._scales.clear()
        for index, param in enumerate(self._in_order()):
            for name, value in state_dict["state"].get(index, {}).items():
                self.set_scaled_state(param, name, value.float())

    def _in_order(self) -> list[torch.Tensor]:
        """Parameters as torch numbers them in a state dict."""
        return [param for group in self.param_groups for param in group["params"]]


def _rounded(value: torch.Tensor, bits: int) -> torch.Tensor:
    """``value`` with a significand of ``bits`` bits."""
    significand, exponent = torch.frexp(value)
    return torch.ldexp(torch.round(significand * 2.0**bits) / 2.0**bits, exponent)


def bridge_precision_aware_optimizer(engine_optimizer: Any) -> None:
    """Let ``megatron.core.optimizer`` take :class:`GroupStepAdamW` for ``use_precision_aware_optimizer``.

    Once per process. The engine asks for Transformer Engine's version (2.1 brought this interface) and looks at
    the arguments of its FusedAdam: it is shown ours, so that the engine's own check says whether they fit.
    """
    optimizer_config = engine_optimizer.optimizer_config
    check = optimizer_config.OptimizerConfig.__post_init__
    shown: dict[str, Any] = {
        name: ModuleType(name)
        for name in (
            "transformer_engine",
            "transformer_engine.pytorch",
            "transformer_engine.pytorch.optimizers",
        )
    }
    shown["transformer_engine.pytorch.optimizers"].FusedAdam = GroupStepAdamW

    def checked(config: Any) -> None:
        hidden = {name: sys.modules[name] for name in shown if name in sys.modules}
        sys.modules.update(shown)
        try:
            check(config)
        finally:
            for name in shown:
                del sys.modules[name]
            sys.modules.update(hidden)

    for module in (engine_optimizer, optimizer_config):
        module.is_te_min_version = lambda *args, **kwargs: True
    optimizer_config.OptimizerConfig.__post_init__ = checked
