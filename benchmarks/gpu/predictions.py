"""What the planner says of every case of ours before anything is measured: the page ``results/h200/predictions.md``.

Run by ``planned.py`` without a folder. The times rest on published speeds of H100s (``planner/calibration.py``); the
memory on what megatron-core and Transformer Engine keep, by their sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cases import CASES, HELD_OUT, Case, case_named
from planned import FITTED, MATRIX_RATE, Planned, config_of_case, gib, planned, stack_of
from record import environment

from megatron_syne.config.schema import RunConfig
from megatron_syne.models.config import resolve_model
from megatron_syne.planner import costs, update
from megatron_syne.planner.hardware import GPUS, Gpu
from megatron_syne.planner.refit import in_use
from megatron_syne.planner.speed import step_time
from megatron_syne.planner.stacks import CUDA_PLATFORM, Stack
from megatron_syne.preflight.size import model_parameters

H200, H100 = GPUS["h200"], GPUS["h100"]
FP8_GOAL, BF16_GOAL = 1.35, 0.6


def page() -> str:
    """All of it, as Markdown."""
    found = environment(None)
    constants = ", ".join(f"{name} {value:.3f}" for name, value in in_use(CUDA_PLATFORM).items())
    software = (
        f"cross entropy `{CUDA_PLATFORM.cross_entropy}`; weight gradients added by their products: layers "
        f"{'yes' if CUDA_PLATFORM.fused_layer_gradients else 'no'}, output layer "
        f"{'yes' if CUDA_PLATFORM.fused_output_gradient else 'no'}"
    )
    rows = ", ".join(f"`{name}`" for name in FITTED)
    return "\n".join(
        [
            HEAD.format(constants=constants, software=software, rows=rows, **found),
            "## Every case on an H200 and an H100\n",
            cases_table(),
            "\n## The goals\n",
            goals(),
            "\n## Where a step of 8 layers goes, H200, ms\n",
            breakdown(),
            "\n## What would change it, H200\n",
            levers(),
            "\n## Memory by hand\n",
            memory_table(),
            MEMORY_READING,
        ]
    )


HEAD = """# The planner's predictions, before anything was measured

`python benchmarks/gpu/planned.py --output benchmarks/results/h200/predictions.md`, {date}, on top of commit {commit}.
**Blind**: no GPU has run any of this. Constants, fitted to published rows of 8 and more H100s:
{constants}.
Software as the CUDA platform sets it: {software}.

`planned.py DIR --fit` will put them beside the records in DIR, fit the constants once, to
{rows},
and leave the others and `held-out` as predictions. Launches of kernels, the host, the loader and the watchers count
nothing, nor does clipping. Memory is GiB: tensors (torch's allocated), and with allocator and context (total).
MFU is of the format's peak (989 and 1,979 TFLOP/s), model FLOPs by `models/flops.py`.
"""


def ours() -> list[Case]:
    """The cases that the planner can say something of."""
    return [case for case in CASES if case.kind == "ours"]


def plan_of(case: Case, gpu: Gpu) -> Planned:
    """The prediction of a case."""
    engine = dict(case.engine)
    return planned(config_of_case(case), gpu, stack_of(engine), engine)


def cases_table() -> str:
    lines = [
        "| case | s/step | tokens/s | TFLOP/s | MFU | tensors | total | H100: s/step | tokens/s | fits 79.1 | notes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in ours():
        plan, other = plan_of(case, H200), plan_of(case, H100)
        fits = "" if plan.total <= H200.memory_bytes else " **does not fit**"
        lines.append(
            f"| {case.name} | {plan.time.seconds:.4f} | {plan.time.tokens_per_second_per_gpu:,.0f} | "
            f"{plan.time.model_flops_per_second_per_gpu / 1e12:.0f} | {plan.time.mfu:.1%} | {gib(plan.tensors)} | "
            f"{gib(plan.total)}{fits} | {other.time.seconds:.4f} | {other.time.tokens_per_second_per_gpu:,.0f} | "
            f"{'yes' if other.total <= H100.memory_bytes else 'no'} | {'; '.join(plan.notes) or '-'} |"
        )
    return "\n".join(lines)


def goals() -> str:
    """What the issue asks for beside what is expected; what a missed goal needs."""
    lines = ["| goal | H200 | H100 |", "|---|---|---|"]
    bf16 = {gpu.name: plan_of(case_named("8l-bf16"), gpu).time for gpu in (H200, H100)}
    shares = [bf16[gpu.name].model_flops_per_second_per_gpu / MATRIX_RATE for gpu in (H200, H100)]
    words = " | ".join(f"{share:.0%}, {'met' if share >= BF16_GOAL else '**missed**'}" for share in shares)
    lines.append(
        f"| 8 layers, bf16: at least {BF16_GOAL:.0%} of {MATRIX_RATE / 1e12:.0f} TFLOP/s | {words} |"
    )
    for recipe in ("tensorwise", "delayed", "blockwise"):
        gains = [
            bf16[gpu.name].seconds / plan_of(case_named(f"8l-{recipe}"), gpu).time.seconds
            for gpu in (H200, H100)
        ]
        words = " | ".join(f"{gain:.2f}x, {'met' if gain >= FP8_GOAL else '**missed**'}" for gain in gains)
        lines.append(f"| 8 layers, FP8 {recipe}: at least {FP8_GOAL}x of bf16 | {words} |")
    return "\n".join(lines) + "\n\n" + fp8_limits()


def fp8_limits() -> str:
    """How far FP8 can come: with products as fast as the data sheet's, and with none at all."""
    base = step_of(config_of_case(case_named("8l-bf16")), CUDA_PLATFORM)
    config = config_of_case(case_named("8l-tensorwise"))

    def gain(share: float) -> float:
        return base / step_of(config, replace(CUDA_PLATFORM, fp8_share=share))

    wanted = next((share for share in (n / 100 for n in range(40, 100)) if gain(share) >= FP8_GOAL), None)
    needs = f"{wanted:.2f} of FP8's peak" if wanted else "more than FP8's whole peak"
    return (
        f"FP8 changes only the layers' products. At {CUDA_PLATFORM.fp8_share:.2f} of FP8's peak 8 layers gain "
        f"{gain(CUDA_PLATFORM.fp8_share):.2f}x; at 0.80, as large products alone may reach, {gain(0.8):.2f}x; were "
        f"they free, {gain(1e6):.2f}x. {FP8_GOAL}x needs {needs}, everything else as it is."
    )


def step_of(config: RunConfig, stack: Stack, gpu: Gpu = H200) -> float:
    """Seconds of a step."""
    return step_time(config, resolve_model(config.model), 1, gpu, stack=stack).seconds


def parts_of(config: RunConfig, stack: Stack, gpu: Gpu = H200) -> dict[str, float]:
    """Seconds of a step by what a person would look for in a profile."""
    model = resolve_model(config.model)
    time, rank = step_time(config, model, 1, gpu, stack=stack), costs.rank_of(config, model, gpu, stack)
    m, head = time.num_microbatches, costs.output_layer(rank)
    output = m * sum(one.matrices for one in head)
    loss = m * sum(one.elementwise for one in head)
    fp8 = rank.cast_bytes > 0
    layers = model.num_layers or 0
    plain = sum(one.elementwise for one in costs.layer(rank, False))
    casts = m * layers * (sum(one.elementwise for one in costs.layer(rank, fp8)) - plain)
    weights = update.weight_cast_seconds(config, rank, model_parameters(model), m)
    return {
        "products of layers": time.parts["matrices"] - output,
        "products of the output layer": output,
        "attention": time.parts["attention"],
        "norms, rotary, SwiGLU, residual": m * layers * plain,
        "casts to FP8, activations": casts,
        "casts to FP8, weights": weights,
        "loss": loss,
        "computed again": time.parts["recompute"],
        "gradients scaled and cleared, norm, Adam": time.parts["optimizer"],
    }


def breakdown() -> str:
    names = ("8l-bf16", "8l-tensorwise", "8b-bf16", "32k-4l-bf16", HELD_OUT)
    columns = {name: parts_of(config_of_case(case_named(name)), CUDA_PLATFORM) for name in names}
    lines = ["| part | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for part in columns[names[0]]:
        lines.append(
            f"| {part} | " + " | ".join(f"{1e3 * column[part]:.1f}" for column in columns.values()) + " |"
        )
    lines.append(
        "| whole | " + " | ".join(f"{1e3 * sum(column.values()):.1f}" for column in columns.values()) + " |"
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class Lever:
    """One change: of a case, or of the software."""

    name: str
    case: Callable[[Case], Case] = lambda case: case
    stack: Callable[[Stack], Stack] = lambda stack: stack


def _with(*overrides: str, **changes: object) -> Callable[[Case], Case]:
    return lambda case: replace(case, overrides=(*case.overrides, *overrides), **changes)  # type: ignore[arg-type]


def _stack(**changes: object) -> Callable[[Stack], Stack]:
    return lambda stack: replace(stack, **changes)  # type: ignore[arg-type]


def _fused(fused: bool) -> Callable[[Stack], Stack]:
    return _stack(fused_layer_gradients=fused, fused_output_gradient=fused)


BF16_GRADIENTS = (
    "precision.accumulate_allreduce_grads_in_fp32=false",
    "optimizer.use_precision_aware_optimizer=true",
    "optimizer.main_grads_dtype=bf16",
)
LEVERS = (
    Lever("2 micro-batches a step", _with(global_batch_size=2)),
    Lever("8 micro-batches a step", _with(global_batch_size=8)),
    Lever("32 micro-batches a step", _with(global_batch_size=32)),
    Lever("16 layers", _with(num_layers=16)),
    Lever("32 layers, 8 micro-batches", _with(num_layers=32, global_batch_size=8)),
    Lever("bf16 gradients, precision-aware optimizer", _with(*BF16_GRADIENTS)),
    Lever(
        "the same with bf16 moments",
        _with(*BF16_GRADIENTS, "optimizer.exp_avg_dtype=bf16", "optimizer.exp_avg_sq_dtype=bf16"),
    ),
    Lever("cross entropy native", stack=_stack(cross_entropy="native")),
    Lever("cross entropy te", stack=_stack(cross_entropy="te")),
    Lever("loss in parts of 2,048 tokens", _with("memory.loss_chunk_tokens=2048")),
    Lever("loss in parts of 8,192 tokens", _with("memory.loss_chunk_tokens=8192")),
    Lever("no weight gradient added by its product", stack=_fused(False)),
    Lever("every weight gradient added by its product", stack=_fused(True)),
    Lever(
        "attention a quarter faster",
        stack=_stack(attention_forward_share=0.75, attention_backward_share=0.625),
    ),
    Lever("element-wise work three times the bytes (nothing fused)", stack=_stack(elementwise_passes=3.0)),
    Lever("products at 0.80 of bf16's peak", stack=_stack(bf16_share=0.8)),
    Lever("products at 0.75 of FP8's peak", stack=_stack(fp8_share=0.75)),
    Lever("the same, 8 micro-batches a step", _with(global_batch_size=8), _stack(fp8_share=0.75)),
    Lever("the same, 16 layers", _with(num_layers=16, global_batch_size=8), _stack(fp8_share=0.75)),
)


def levers() -> str:
    lines = [
        "Model FLOP/s over those of `8l-bf16` and of `8l-tensorwise`, one change each, and the ratio of tokens/s of "
        "the two with the change on both sides. 0.75 of FP8's peak is what Megatron-Bridge 25.11's published row "
        "implies, 0.64 that of NeMo 25.02, which is in use.\n",
        "| change | bf16 | tensorwise | FP8 over bf16 |",
        "|---|---|---|---|",
    ]
    rates = dict(_rates(Lever("as planned")))
    lines.append(f"| as planned | 1.000 | 1.000 | {rates['8l-tensorwise'] / rates['8l-bf16']:.2f} |")
    for lever in LEVERS:
        own = dict(_rates(lever))
        gains = [own[name] / rates[name] for name in ("8l-bf16", "8l-tensorwise")]
        ratio = own["8l-tensorwise"] / own["8l-bf16"]
        lines.append(f"| {lever.name} | {gains[0]:.3f} | {gains[1]:.3f} | {ratio:.2f} |")
    return "\n".join(lines)


def _rates(lever: Lever) -> Iterator[tuple[str, float]]:
    """Model FLOP/s by case: as tokens/s where the layers are the same, and comparable where they are not."""
    for name in ("8l-bf16", "8l-tensorwise"):
        config = config_of_case(lever.case(case_named(name)))
        time = step_time(config, resolve_model(config.model), 1, H200, stack=lever.stack(CUDA_PLATFORM))
        yield name, time.model_flops_per_second_per_gpu


def memory_table() -> str:
    names = [
        case.name for case in ours() if case.name in ("8l-bf16", "8l-tensorwise") or case.num_layers == 32
    ]
    plans = {name: plan_of(case_named(name), H200) for name in names}
    parts = list(next(iter(plans.values())).components)
    lines = ["| GiB | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for part in parts:
        lines.append(
            f"| {part} | " + " | ".join(gib(plan.components[part]) for plan in plans.values()) + " |"
        )
    lines.append("| total | " + " | ".join(gib(plan.total) for plan in plans.values()) + " |")
    return "\n".join(lines)


MEMORY_READING = """
- 8B has 8.03e9 parameters. bf16 weights 2, bf16 gradients 2, fp32 master 4, fp32 moments 8: 16 bytes, 128.5 GB or 119.7
  GiB; bf16 moments leave 12 bytes, 89.7 GiB. fp32 gradients add 15.0 GiB.
- Transformer Engine's FusedAdam copies moments and masters that are not fp32 to fp32 for all the parameters it is
  given: 8 bytes for each with bf16 moments, 59.8 GiB for the whole 8B, which would not fit an H200
  (149.6 GiB). `platform/adam_slices.py` gives it 2**27 parameters at a time; then it is 3.9 GiB (the embedding), in
  the room of the activations.
- With `fp8_param_gather`, tensorwise or blockwise FP8 and fp32 masters megatron-core keeps masters and fp32 gradients
  itself: bf16 gradients are copied whole for the step, 29.9 GiB on the 8B; fp16 masters, or delayed scaling, avoid it.
  No case of the 8B gathers FP8 weights.
- The optimizer that offloads keeps an fp32 copy of the bf16 gradient of every parameter left on the GPU, from one step
  to the next: 4 bytes each, 9.0 GiB with three tenths of the 8B.
- On an H100 of 79.1 GiB bf16 weights, gradients and moments and fp16 masters, 10 bytes for each parameter, are 74.8
  GiB, too much with 4 GiB of activations and the context; with the first moment in FP8 it is 9 bytes, 67.3 GiB.
"""
