"""Make this process believe in a CUDA GPU with Transformer Engine: torch.cuda bridged to the CPU, a stand-in extension.

To be called before megatron-core is imported. The engine and Transformer Engine's Python files are the real ones;
``CudaPlatform`` is ours as it is, but for nccl, in whose place gloo is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
import time
import types
from typing import Any


class Event:
    """An event in a stream that is always idle."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1000.0 * (end.at - self.at)

    def wait(self, stream: Any = None) -> None:
        """Done already."""

    synchronize = wait

    def query(self) -> bool:
        return True


class Stream:
    """The one stream there is."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""

    wait_event = wait_stream

    def synchronize(self) -> None:
        """Idle."""

    def record_event(self, event: Any = None) -> Event:
        return event or Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


def forgiving_dataclass(*arguments: Any, **options: Any) -> Any:
    """pydantic's: arguments that are no fields are dropped, and megatron-core gives ``DelayedScaling`` one."""

    def decorate(cls: Any) -> Any:
        made = dataclasses.dataclass(cls, **options)
        plain = made.__init__
        names = {field.name for field in dataclasses.fields(made)}

        def init(self: Any, *positional: Any, **given: Any) -> None:
            plain(self, *positional, **{name: value for name, value in given.items() if name in names})

        made.__init__ = init
        return made

    return decorate(arguments[0]) if arguments else decorate


def stub_packages() -> None:
    """What Transformer Engine's files import for kernels and exporters that are not used here."""
    import torch  # noqa: F401 (before the stand-ins: torch looks for triton too)
    from te_stub import StandInFinder

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine then looks for no CUDA library
    pydantic = types.ModuleType("pydantic")
    pydantic.__path__ = []  # type: ignore[attr-defined]
    sys.modules["pydantic"] = pydantic
    recipes = types.ModuleType("pydantic.dataclasses")
    recipes.dataclass = forgiving_dataclass  # type: ignore[attr-defined]
    sys.modules["pydantic.dataclasses"] = recipes  # the recipes use its decorator alone
    sys.meta_path.insert(0, StandInFinder())


def bridge_torch() -> None:
    """torch.cuda on the CPU; a mode sends there what is addressed to CUDA, as the CPU platform does."""
    import torch

    import megatron_syne.platform.cpu as bridge

    cpu = torch.device("cpu")
    is_cuda = torch.Tensor.is_cuda

    class Mode(bridge._CudaToCpu):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__self__", None) is is_cuda:
                return True
            if func is torch.device and (isinstance(args[0], int) or str(args[0]).startswith("cuda")):
                return cpu
            if kwargs and isinstance(kwargs.get("device"), int):
                kwargs = {**kwargs, "device": cpu}
            return super().__torch_function__(func, types, args, kwargs)

    cuda: Any = torch.cuda
    properties = types.SimpleNamespace(
        name="stand-in", major=9, minor=0, total_memory=1 << 34, multi_processor_count=132
    )
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *a, **k: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda index: None,
        "get_device_name": lambda *a: properties.name,
        "get_device_properties": lambda *a: properties,
        "get_device_capability": lambda *a: (9, 0),
        "synchronize": lambda *a, **k: None,
        "empty_cache": lambda: None,
        "max_memory_allocated": lambda *a: 0,
        "memory_allocated": lambda *a: 0,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda *a: Stream(),
        "default_stream": lambda *a: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "manual_seed_all": lambda seed: None,
        "_lazy_init": lambda: None,
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    cuda.default_generators = (torch.default_generator,)
    cuda.random.get_rng_state = cuda.get_rng_state
    torch.version.cuda = "13.0"
    wrapper = torch.Tensor._make_wrapper_subclass
    # FP8 tensors say that they are on the GPU: there is none to be on
    torch.Tensor._make_wrapper_subclass = lambda *a, device=None, **k: wrapper(*a, device=cpu, **k)
    torch.Tensor.pin_memory = lambda self, *a: self  # also in the loader's thread, where no mode is
    bridge._CudaToCpu = Mode  # the backward pass opens one of its own
    autograd: Any = torch.autograd
    run_backward = autograd._engine_run_backward

    def run_backward_bridged(*args: Any, **kwargs: Any) -> Any:
        with Mode():
            return run_backward(*args, **kwargs)

    autograd._engine_run_backward = run_backward_bridged
    Mode().__enter__()


def install() -> Any:
    """The stand-in extension, Transformer Engine's Python files on top of it, and the bridge; returns the stand-in."""
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    stub_packages()
    from te_cpu import extension

    sys.modules["transformer_engine_torch"] = extension
    sys.modules["apex"] = None  # type: ignore[assignment]
    import transformer_engine.common as common

    common.load_framework_extension = lambda name: None
    bridge_torch()
    import transformer_engine.pytorch  # noqa: F401

    kernels = importlib.import_module("transformer_engine.pytorch.triton.cross_entropy")
    kernels.cross_entropy_forward = extension.cross_entropy_forward
    kernels.cross_entropy_backward = extension.cross_entropy_backward
    from megatron.core.tensor_parallel import random as engine_random

    engine_random._set_cuda_rng_state = lambda state, *a, **k: sys.modules["torch"].set_rng_state(state)
    from megatron_syne.platform import cuda_kernels
    from megatron_syne.platform.cpu_gloo import bridge_gloo
    from megatron_syne.platform.cuda import CudaPlatform

    cuda_kernels.triton_failure = lambda: None  # whatever compiler there is: its kernels are stand-ins
    bridge_gloo()  # gloo's own takes tensors of several types that are gathered at once for one type
    CudaPlatform.backend = "gloo"
    return extension
