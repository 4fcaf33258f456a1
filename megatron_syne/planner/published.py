"""Published training speeds of Llama-3 as data, each with the configuration that it is of. No torch.

The counted rows are those of 8B and 70B on H100 that the project's comparison of peers holds. ``fitted`` ones gave
``stacks`` its constants; ``unfitted`` ones are predictions alone; ``extra`` ones (other GPUs, 405B, rows found
later in the same sources) are shown and not counted. Tokens/s are compared, not FLOP/s, which the sources count
differently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_syne.config.schema import (
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from megatron_syne.models.config import resolve_model
from megatron_syne.planner.hardware import GPUS, Gpu
from megatron_syne.planner.speed import StepTime, step_time
from megatron_syne.planner.stacks import MEGATRON, MEGATRON_FSDP, TORCHTITAN, TORCHTITAN_EAGER, Stack

H100 = GPUS["h100"]
H100_500W = replace(H100, name="h100, 500 W", memory_bytes=96 * 2**30, memory_bandwidth=2.4e12)
"""torchtitan's machine: 96 GB of HBM2e at 2.4 TB/s (stated beside its tables)."""


@dataclass(frozen=True)
class Row:
    """One measurement and its configuration."""

    name: str
    tokens_per_second: float
    """Per GPU, as published."""
    source: str
    preset: str
    """Model, by the name that ``model.preset`` takes."""
    gpus: int
    global_batch: int
    micro_batch: int = 1
    fp8: Literal["delayed", "tensorwise"] | None = None
    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    seq_length: int = 8192
    layout: str | None = None
    """``pipeline_model_parallel_layout``."""
    full_recompute: bool = False
    stack: Stack = MEGATRON
    gpu: Gpu = H100
    use: Literal["fitted", "unfitted", "extra"] = "unfitted"
    note: str = ""
    """What the source leaves open, and what was taken."""


_DGXC = "dgxc-benchmarking v25.02, llama3.1 README"
_BRIDGE = "Megatron-Bridge performance archive, "
_TITAN = "torchtitan, benchmarks of 2024-12"
_ASYNC = "torchtitan, async TP, 2025-06"
_LENGTH = "sequence not stated beside the table: torchtitan's default of 8,192"
_OLD_FP8 = "FP8 recipe not stated: delayed, the software's default"

_8B = Row("", 0, "", "llama3_8b", 8, 128)
_8B_CP2 = replace(_8B, cp=2, source=_DGXC)
_8B_FSDP = replace(_8B, fp8="tensorwise", stack=MEGATRON_FSDP)
_70B_CP2 = replace(_8B, preset="llama3_70b", gpus=64, tp=4, pp=4, vpp=5, cp=2, source=_DGXC)
_70B_PP8 = replace(_70B_CP2, pp=8, cp=1, fp8="tensorwise", note="layers taken as evenly laid out")
_TITAN_8B = Row(
    "", 0, _TITAN, "llama3_8b", 8, 16, 2, stack=TORCHTITAN, gpu=H100_500W, note=_LENGTH
)  # fmt: skip
_TITAN_8B_TP8 = replace(_TITAN_8B, source=_ASYNC, gpus=64, tp=8, micro_batch=12, global_batch=96)
_TITAN_70B = replace(
    _TITAN_8B_TP8, preset="llama3_70b", gpus=256, micro_batch=16, global_batch=512, full_recompute=True
)
_TITAN_LONG = replace(_TITAN_8B, fp8="tensorwise", micro_batch=1, full_recompute=True, use="extra", note="")
_TITAN_405B = replace(
    _TITAN_70B,
    preset="llama3_1_405b",
    source=_TITAN,
    fp8="tensorwise",
    gpus=512,
    pp=8,
    micro_batch=1,
    global_batch=256,
    stack=replace(TORCHTITAN, fsdp=False),  # beside PP the weights stay gathered
    use="extra",
    note="pipeline's micro-batch and cut not stated: 1 sample, first and last part a layer less; " + _LENGTH,
)
_META_405B = replace(
    _8B,
    preset="llama3_1_405b",
    source="The Llama 3 Herd of Models (arXiv 2407.21783), table 4",
    global_batch=2048,
    tp=8,
    pp=16,
    vpp=8,
    layout="E|" + "t|" * 126 + "L",
    use="extra",
    note="tokens/s derived here from 430, 400 and 380 TFLOP/s with our count, theirs is not stated; chunks of one "
    "layer taken",
)


def _row(base: Row, name: str, tokens_per_second: float, **changes: object) -> Row:
    return replace(base, name=name, tokens_per_second=tokens_per_second, **changes)  # type: ignore[arg-type]


ROWS: tuple[Row, ...] = (
    _row(_8B_CP2, "8B bf16 CP2", 10254, use="fitted"),
    _row(_8B_CP2, "8B FP8 CP2", 13882, fp8="delayed", use="fitted", note=_OLD_FP8),
    _row(
        _8B_CP2,
        "8B FP8 CP2, 24.12",
        12273,
        fp8="delayed",
        source="NeMo 24.12 performance summary",
        note=_OLD_FP8,
    ),
    _row(_8B_FSDP, "8B FP8 FSDP, 25.09", 14079, source=_BRIDGE + "25.09"),
    _row(_8B_FSDP, "8B FP8 FSDP, 25.11", 14451, source=_BRIDGE + "25.11"),
    _row(_70B_CP2, "70B bf16 TP4 PP4 CP2", 1121, use="fitted"),
    _row(_70B_CP2, "70B FP8 TP4 PP4 CP2", 1567, fp8="delayed", note=_OLD_FP8),
    _row(_70B_PP8, "70B FP8 TP4 PP8, 25.09", 1619, source=_BRIDGE + "25.09"),
    _row(_70B_PP8, "70B FP8 TP4 PP8, 25.11", 1602, source=_BRIDGE + "25.11"),
    *(
        _row(
            _70B_PP8,
            f"70B FP8 TP4 PP8, {version}",
            speed,
            source=_BRIDGE + "26.04.01, row of " + version,
            global_batch=256,
        )
        for version, speed in (("26.02", 1621), ("26.02.01", 1639), ("26.04", 1633), ("26.04.01", 1664))
    ),
    _row(_TITAN_8B, "8B bf16 torchtitan eager", 5762, stack=TORCHTITAN_EAGER),
    _row(_TITAN_8B, "8B bf16 torchtitan", 6667, use="fitted"),
    _row(_TITAN_8B, "8B FP8 torchtitan", 8532, fp8="tensorwise"),
    _row(_TITAN_8B, "8B FP8 torchtitan, 128 GPUs", 8380, fp8="tensorwise", gpus=128, global_batch=256),
    _row(_TITAN_8B_TP8, "8B bf16 torchtitan TP8", 4809, use="fitted"),
    _row(_TITAN_8B_TP8, "8B FP8 torchtitan TP8", 5570, fp8="tensorwise"),
    _row(_TITAN_70B, "70B bf16 torchtitan TP8", 652, use="fitted"),
    _row(_TITAN_70B, "70B FP8 torchtitan TP8", 942, fp8="tensorwise"),
    # shown, not counted
    _row(
        _TITAN_8B,
        "8B bf16 torchtitan eager, 128 GPUs",
        5605,
        gpus=128,
        global_batch=256,
        stack=TORCHTITAN_EAGER,
        use="extra",
    ),
    _row(_TITAN_8B, "8B bf16 torchtitan, 128 GPUs", 6514, gpus=128, global_batch=256, use="extra"),
    _row(_TITAN_70B, "70B FP8 torchtitan TP8, 2024-12", 876, source=_TITAN, fp8="tensorwise", use="extra"),
    _row(_TITAN_LONG, "8B FP8 torchtitan, 32k", 3890, seq_length=32768, global_batch=8),
    _row(_TITAN_LONG, "8B FP8 torchtitan, 64k CP2", 2540, seq_length=65536, cp=2, global_batch=4),
    _row(_TITAN_LONG, "8B FP8 torchtitan, 128k CP4", 1071, seq_length=131072, cp=4, global_batch=2),
    _row(_TITAN_LONG, "8B FP8 torchtitan, 256k CP8", 548, seq_length=262144, cp=8, global_batch=1),
    _row(_TITAN_405B, "405B FP8 torchtitan 1F1B", 100, layout="Et*15|" + "t*16|" * 6 + "t*15L"),
    _row(_TITAN_405B, "405B FP8 torchtitan interleaved", 128, vpp=2, layout="Et*7|" + "t*8|" * 14 + "t*7L"),
    _row(
        _TITAN_8B,
        "8B FP8 torchtitan, 32 H200",
        10938,
        source="torchtitan, H200 benchmark of 2025-06",
        fp8="tensorwise",
        gpus=32,
        global_batch=64,
        gpu=GPUS["h200"],
        stack=replace(TORCHTITAN, bf16_share=MEGATRON.bf16_share, fp8_share=MEGATRON.fp8_share),
        use="extra",
        note="full power taken, so megatron-core's shares; " + _LENGTH,
    ),
    _row(_META_405B, "405B bf16, 8,192 GPUs", 170.4, gpus=8192),
    _row(_META_405B, "405B bf16, 16,384 GPUs", 158.5, gpus=16384),
    _row(_META_405B, "405B bf16, 131k CP16", 93.9, gpus=16384, cp=16, seq_length=131072, global_batch=128),
)


def configuration(row: Row) -> RunConfig:
    """The run that a row measured, as a configuration of ours; what overlaps in the sources' recipes overlaps."""
    recompute = MemoryConfig(recompute_granularity="full", recompute_method="uniform")
    return RunConfig(
        run_dir="published",
        platform="cuda",
        model=ModelConfig(preset=row.preset),
        parallel=ParallelConfig(
            tensor_model_parallel_size=row.tp,
            pipeline_model_parallel_size=row.pp,
            virtual_pipeline_model_parallel_size=row.vpp,
            context_parallel_size=row.cp,
            cp_comm_type="all_gather" if "torchtitan" in row.stack.name else None,
            pipeline_model_parallel_layout=row.layout,
            sequence_parallel=row.tp > 1,
            tp_comm_overlap=row.tp > 1,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        memory=recompute if row.full_recompute else MemoryConfig(),
        data=DataConfig(seq_length=row.seq_length, mock=True),
        precision=PrecisionConfig(fp8=row.fp8),
        train=TrainConfig(
            micro_batch_size=row.micro_batch, global_batch_size=row.global_batch, train_iters=1
        ),
    )


def prediction(row: Row) -> StepTime:
    """What the planner says of a row's configuration on the row's software."""
    config = configuration(row)
    return step_time(config, resolve_model(config.model), row.gpus, row.gpu, stack=row.stack)
