"""What a job of ``worker.py`` looks at besides its losses: callbacks of the trainer, each with ``found``."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_syne.models.gpt import unwrap
from megatron_syne.training.callback import Callback


class Engine(Callback):
    """``EngineFp8`` between two steps: nothing that it does may leave a trace, but for the layer put into bf16."""

    def __init__(self, extension: Any) -> None:
        self.calls = extension.CALLS
        self.found: dict[str, Any] = {}

    def on_batch(self, trainer: Any, batches: list[Any]) -> None:
        step, fp8, found = trainer.state.step, trainer.fp8, self.found
        if step == 0:
            found["fresh"] = all(
                bool((value == 1).all()) for name, value in fp8.state().items() if "scale" in name
            )
        if step == 2:
            before = fp8.state()
            found["names"] = list(fp8.names)
            found["scaled"] = all(
                bool((v != 1).all()) for name, v in before.items() if name.endswith(".scale")
            )
            fp8.load_state({name: value * 2 for name, value in before.items()})
            found["doubled"] = same(fp8.state(), {name: value * 2 for name, value in before.items()})
            layer = unwrap(trainer.chunks[0]).decoder.layers[0].mlp.linear_fc1
            quantizer = layer.quantizers["scaling_fwd"][0]
            name = "decoder.layers.0.mlp.linear_fc1.input.scale"
            found["quantizer_sees_it"] = bool((quantizer.scale == before[name] * 2).all())
            fp8.load_state(before)
            found["round_trip"] = same(fp8.state(), before)
            found["in_fp8"] = self.quantized(trainer, batches)
            found["evaluated"] = same(fp8.state(), before)
            with fp8.disabled():
                found["disabled"] = self.quantized(trainer, batches)
            with fp8.watched() as counts:
                self.quantized(trainer, batches)
            found["watched"] = sorted(counts)
            found["untouched"] = same(fp8.state(), before)
        if step == 3:
            fp8.use_bf16([0])
            found["one_in_bf16"] = self.quantized(trainer, batches)

    def quantized(self, trainer: Any, batches: list[Any]) -> int:
        """Tensors that were rounded to FP8 in a forward pass without gradients over one micro-batch."""
        count = self.calls.get("quantize", 0)
        with torch.no_grad():
            trainer.run_schedule(batches[:1], batches[0]["tokens"].shape[1], forward_only=True)
        return self.calls.get("quantize", 0) - count


class Gradients(Callback):
    """Who added weight gradients into DDP's buffer, of which type that is, and what trains at all."""

    def __init__(self, extension: Any) -> None:
        self.found: dict[str, Any] = {}

    def on_step_start(self, trainer: Any) -> None:
        self.before = {name: value.detach().clone() for name, value in trainer.chunks[0].named_parameters()}

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        named = dict(unwrap(trainer.chunks[0]).named_parameters())
        self.found = {
            "types": sorted({str(p.main_grad.dtype) for p in named.values() if hasattr(p, "main_grad")}),
            "fused": [
                n
                for n, m in trainer.chunks[0].named_modules()
                if getattr(m, "fuse_wgrad_accumulation", False)
            ],
            "moved": [
                name
                for name, value in trainer.chunks[0].named_parameters()
                if not torch.equal(value, self.before[name])
            ],
        }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


WAITING = [
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "equal",
    "nonzero",
    "cpu",
    "numpy",
]
"""Functions whose result the host needs: on a GPU they wait for all that was queued before them."""


def place() -> str | None:
    """File and function that called, None where the stand-in itself did."""
    frames = [frame for frame in traceback.extract_stack()[:-2] if "/torch/" not in frame.filename]
    for frame in reversed(frames):
        name = frame.filename.split("site-packages/")[-1].split("te_names/")[-1]
        if name.endswith(("te_cpu/harness.py", "platform/cpu.py")):
            continue  # the bridge's mode
        if "te_cpu/" in name:
            return None
        if "/megatron_syne/" in name:
            name = "megatron_syne/" + name.rpartition("/megatron_syne/")[2]
        return f"{name}:{frame.lineno} {frame.name}"
    return None


class Waits(Callback):
    """Where the host waits for the device in one training step, or copies to it out of pageable memory with a wait."""

    def __init__(self, extension: Any) -> None:
        self.found: dict[str, Any] = {"waits": [], "copies": []}
        waits, copies = self.found["waits"], self.found["copies"]

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = getattr(func, "__name__", "")
                if name in WAITING and (where := place()):
                    waits.append(f"{name} {where}")
                elsewhere = str((kwargs or {}).get("device", "cpu")) != "cpu"
                if elsewhere and func in (torch.tensor, torch.as_tensor) and (where := place()):
                    copies.append(f"{name} {where}")
                return func(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = func.overloadpacket.__name__
                masked = name in ("index", "index_put", "index_put_") and any(
                    index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
                )
                waiting = masked or name in ("nonzero", "unique_consecutive", "masked_select")
                if waiting and (where := place()):
                    waits.append(f"{name} {where}")
                return func(*args, **(kwargs or {}))

        self.modes = (Functions(), Operators())

    def on_step_start(self, trainer: Any) -> None:
        if trainer.state.step == 2:
            for mode in self.modes:
                mode.__enter__()

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        if trainer.state.step == 3:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)
