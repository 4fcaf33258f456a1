"""Parameter names and shapes of the model that the CUDA platform builds, without a GPU.

Run by ``test_te_names.py`` in a process of its own, ``PYTHONPATH`` holding the package of Transformer
Engine's Python files: reads a JSON list of cases on stdin, each with fields of ``model``, ``parallel`` and
``precision``; prints for each case and rank ``{parameter name: shape}``. The compiled extension, and the
packages that the Python files import for their kernels and exporters, are stand-ins: the layers can be
constructed on the meta device, never run.
"""

from __future__ import annotations

import dataclasses
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
import warnings
from typing import Any

STAND_INS = ("einops", "onnx", "onnxscript", "transformer_engine_torch", "triton")
Shapes = dict[str, list[int]]


class AnythingType(type):
    """A class whose every attribute is again such a class (``tex.DType.kFloat8E4M3``)."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Anything(metaclass=AnythingType):
    """Stands for any object; applied as a decorator it returns the function unchanged."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes everything."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


class StandIn(types.ModuleType):
    """A module, and package, that has everything."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers ``import triton.language`` and the like with an empty stand-in."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "transformer_engine_torch":
            module.get_cudnn_version = lambda: 91900  # type: ignore[attr-defined]


def install_stand_ins() -> None:
    """Make ``import transformer_engine.pytorch`` pass; to be called after torch has been imported."""
    import torch

    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine then looks for no CUDA library
    pydantic = types.ModuleType("pydantic")
    pydantic.__path__ = []  # type: ignore[attr-defined]
    sys.modules["pydantic"] = pydantic
    sys.modules["pydantic.dataclasses"] = dataclasses  # the recipes use its decorator alone
    sys.meta_path.insert(0, StandInFinder())
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: "meta"
    torch.Tensor.cuda = lambda self: self

    import transformer_engine.common as common

    common.load_framework_extension = lambda name: importlib.import_module(f"transformer_engine_{name}")


def case_shapes(case: dict[str, dict[str, Any]]) -> list[Shapes]:
    """Build every rank's part with our own ``build_model``; ``{name: shape}`` for each rank."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_syne.config.schema import RunConfig
    from megatron_syne.models.gpt import build_model, named_parameters
    from megatron_syne.parallel.topology import world_size_of
    from megatron_syne.platform.cuda import CudaPlatform

    class MetaPlatform(CudaPlatform):
        """The CUDA platform, its layers and options; only the memory is none."""

        device = torch.device("meta")

        def engine_options(self, config: RunConfig) -> dict[str, Any]:
            meta = {"init_model_with_meta_device": True, "perform_initialization": False}
            return super().engine_options(config) | meta

    config = RunConfig(run_dir="unused")
    for section, fields in case.items():
        for name, value in fields.items():
            assert hasattr(getattr(config, section), name), f"{section}.{name}"
            setattr(getattr(config, section), name, value)
    parallel = config.parallel
    world = world_size_of(parallel)
    result = []
    for rank in range(world):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        sys.excepthook = sys.__excepthook__  # torch's puts the rank before each line, here all of them
        parallel_state.initialize_model_parallel(
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            create_gloo_process_groups=False,
        )
        chunks = build_model(config, config.model, MetaPlatform())
        kinds = {type(module).__name__ for chunk in chunks for module in chunk.modules()}
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"} <= kinds, (
            kinds
        )
        shapes = {name: list(p.shape) for chunk in chunks for name, p in named_parameters(chunk)}
        assert all(p.device.type == "meta" for chunk in chunks for p in chunk.parameters())
        result.append(shapes)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return result


def main() -> None:
    """stdin -> stdout."""
    warnings.simplefilter("ignore")
    cases = json.load(sys.stdin)
    import torch  # noqa: F401 (before the stand-ins: torch looks for triton too)

    install_stand_ins()
    import transformer_engine

    answer = {
        "transformer_engine": transformer_engine.__version__,
        "cases": [case_shapes(case) for case in cases],
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
