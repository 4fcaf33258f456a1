"""megatron-core on a CPU over gloo: every bridge to the unmodified engine, each with its reason.

megatron-core 0.16 names CUDA in about sixty places on the path of a training step. They fall into seven
kinds, and each is bridged once here rather than patched where it stands:

* ``device="cuda"`` and ``.cuda()``, ``pin_memory=True``: a ``TorchFunctionMode`` sends them to the CPU;
* ``torch.cuda.current_device()``, ``synchronize()``, the CUDA random state: replaced by CPU versions;
* comparisons with ``"torch.cuda.FloatTensor"``: ``Tensor.type()`` answers with the CUDA spelling;
* Adam: the distributed optimizer's checkpoints need a step per group, as Transformer Engine and apex have;
* norms: the engine's local ones refuse sequence parallelism and zero-centred weights;
* attention: the engine's local one refuses CP, and writes out all scores;
* gloo: a network thread for each group of one rank, and their collectives (``cpu_gloo``).

The mode is thread-local: only the main thread may call the engine. CUDA streams, events and graphs are not
bridged; ``preflight`` refuses the options that need them. Only ever installed where no CUDA is visible.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import warnings
from typing import Any

# Read when torch's compiler is first imported: megatron-core decorates functions with torch.compile at
# import, which would call a C++ compiler in the first step (1.5-9.5 s against 0.2 s).
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
# A half-installed Transformer Engine (its meta wheel alone) makes ``import megatron.core`` fail on a machine
# without a GPU, and a whole one would put CUDA kernels into the optimizer: neither is wanted here.
for _package in ("transformer_engine", "apex"):
    sys.modules.setdefault(_package, None)  # type: ignore[arg-type]

import torch
from torch.overrides import TorchFunctionMode

from megatron_syne.config.schema import PrecisionConfig, RunConfig
from megatron_syne.errors import ConfigError
from megatron_syne.fp8.choice import describe_fp8, emulates_fp8
from megatron_syne.platform.adam_slices import in_slices
from megatron_syne.platform.base import Platform, use_deterministic_torch
from megatron_syne.platform.cpu_adam import GroupStepAdamW, bridge_precision_aware_optimizer
from megatron_syne.platform.cpu_gloo import bridge_gloo
from megatron_syne.platform.cpu_norm import LocalNorm

_CPU = torch.device("cpu")


class _CudaToCpu(TorchFunctionMode):
    """Redirect what the engine addresses to CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if kwargs:  # most calls have none, and every call comes through here
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        elif func is torch.Tensor.type and len(args) == 1:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if (
            func is torch.Tensor.to
            and len(args) > 1
            and isinstance(args[1], (str, torch.device))
            and str(args[1]).startswith("cuda")
        ):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **(kwargs or {}))


_bridge: _CudaToCpu | None = None


def install_bridge() -> None:
    """Bridge the engine to this CPU, once per process; refuses where CUDA is visible."""
    global _bridge
    if _bridge is not None:
        return
    if torch.cuda.is_available():
        raise ConfigError(
            "platform cpu was chosen after torch had found a GPU; set CUDA_VISIBLE_DEVICES= (empty) and retry"
        )
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.manual_seed = torch.manual_seed

    # "Transformer Engine and Apex are not installed": known, and meant. torch 2.13 renames two collectives
    # that the engine calls by their old names, and tells so once per call site.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")

    # Its fused functions are decorated at import. They run uncompiled here (see the head of this file), and
    # the compiler need not be imported either: half of the engine's import time.
    compiler, torch.compile = torch.compile, _left_as_it_is
    from megatron.core import optimizer as engine_optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random as engine_random

    torch.compile = compiler
    engine_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # The default False counts as FP8 (the engine asks "is not None") and would look for Transformer Engine's state.
    engine_random.CheckpointWithoutOutput.__init__.__defaults__ = (None,)
    # CPU and "CUDA" random states are one and the same here; the tracker takes that for a mistake.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    engine_optimizer.Adam, engine_optimizer.USING_PYTORCH_OPTIMIZER = in_slices(GroupStepAdamW), False
    distrib_optimizer.Adam = GroupStepAdamW
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    bridge_precision_aware_optimizer(engine_optimizer)
    bridge_gloo()
    _bridge = _CudaToCpu()
    _bridge.__enter__()
    # torch.autograd.backward asks the mode first and then runs without it; recomputed layers need it in there.
    autograd: Any = torch.autograd
    run_backward = autograd._engine_run_backward

    def run_backward_bridged(*args: Any, **kwargs: Any) -> Any:
        with _CudaToCpu():
            return run_backward(*args, **kwargs)

    autograd._engine_run_backward = run_backward_bridged


def _left_as_it_is(function: Any = None, **_: Any) -> Any:
    """``torch.compile`` that compiles nothing, as a call or with options as a decorator."""
    return function if function is not None else _left_as_it_is


class CpuPlatform(Platform):
    """gloo, the engine's local layers, one thread per rank unless OMP_NUM_THREADS says otherwise."""

    name = "cpu"
    backend = "gloo"

    def __init__(self) -> None:
        self._fp8 = ""

    @property
    def device(self) -> torch.device:
        return _CPU

    def start(self, local_rank: int, precision: PrecisionConfig, deterministic: bool = False) -> None:
        use_deterministic_torch(deterministic)
        install_bridge()
        self._fp8 = describe_fp8(precision, self.name)

    def layer_spec(self, config: RunConfig) -> tuple[Any, Any]:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

        from megatron_syne.platform.cpu_attention import LocalAttention

        spec = get_gpt_layer_local_spec()
        spec.submodules.input_layernorm = LocalNorm
        spec.submodules.pre_mlp_layernorm = LocalNorm
        spec.submodules.self_attention.submodules.core_attention = LocalAttention
        if emulates_fp8(config.precision, self.name):
            from megatron_syne.fp8.linear import emulate_linears

            emulate_linears(spec)
        return spec, LocalNorm

    def engine_options(self, config: RunConfig) -> dict[str, Any]:
        return {
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,  # apex's or Transformer Engine's kernel
            "persist_layer_norm": False,
            "masked_softmax_fusion": False,  # bf16: imports a CUDA extension
            "bias_activation_fusion": False,  # torch.compile
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,  # Transformer Engine's kernel
            "cross_entropy_loss_fusion": False,  # casts the gradient of the logits to bf16, also in fp32
        }

    def document_attention(self, document_ids: torch.Tensor) -> tuple[torch.Tensor | None, Any]:
        """A mask [micro batch, 1, seq, seq], True = not seen. It is taken in place of the causal one, so it holds
        that too."""
        other = document_ids[:, :, None] != document_ids[:, None, :]
        later = torch.ones(other.shape[1:], dtype=torch.bool).triu(diagonal=1)
        return (other | later)[:, None], None

    def peak_memory(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def describe(self) -> str:
        return (
            f"cpu: torch {torch.__version__}, gloo, {torch.get_num_threads()} thread(s) per rank, "
            f"megatron-core local layers{self._fp8}"
        )
