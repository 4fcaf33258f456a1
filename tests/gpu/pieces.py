"""The jobs of ``worker.py`` that look at a part: the machine, logits, one FP8 layer, the clock of the device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from megatron_syne.assembly import initialize
from megatron_syne.config.loader import load_config
from megatron_syne.fp8.emulation import ChunkScaling, Phase, Settings, Switches
from megatron_syne.fp8.recipes import formats
from megatron_syne.models.config import resolve_model
from megatron_syne.parallel.ranks import rank_info
from megatron_syne.parallel.setup import start_distributed, start_model_parallel, stop_model_parallel
from megatron_syne.preflight.rules import check

HISTORY = 16
ROUNDS = 4


def describe(job: dict[str, Any], platform: Any) -> dict[str, Any]:
    """The line of the log, and the versions in it."""
    config = load_config(job["config"], job["overrides"])
    platform.start(0, config.precision)
    found = {"line": platform.describe(), "device_name": platform.device_name, "torch": torch.__version__}
    if platform.name == "cuda":
        import transformer_engine

        found["transformer_engine"] = getattr(transformer_engine, "__version__", "?")
        found["cudnn"] = torch.backends.cudnn.version()
        found["capability"] = list(torch.cuda.get_device_capability())
    return found


def logits(job: dict[str, Any], platform: Any) -> dict[str, Any]:
    """Logits of the rows, fp32 [rows, seq, vocabulary], in a file beside the run folder; by the trainer's forward
    step, with the ``documents`` of these lengths apart where given."""
    from safetensors.torch import save_file

    config = load_config(job["config"], job["overrides"])
    model, info = resolve_model(config.model), rank_info()
    check(config, model, info.world_size, platform.name)
    platform.start(info.local_rank, config.precision, config.train.deterministic_mode)
    start_distributed(platform, info, 120)
    start_model_parallel(config.parallel, config.train.seed)
    from megatron_syne.models.gpt import build_model
    from megatron_syne.training.forward import forward_step

    (chunk,) = chunks = build_model(config, model, platform)
    initialize(config, model, chunks)
    chunk.eval()
    found = []
    for row in job["rows"]:
        batch = {"tokens": torch.tensor([row]), "position_ids": torch.arange(len(row))[None]}
        if "documents" in job:
            lengths = torch.tensor(job["documents"])
            batch["document_ids"] = torch.arange(len(lengths)).repeat_interleave(lengths)[None].int()
        with torch.no_grad():
            output, _ = forward_step(platform, iter([platform.to_device(batch)]), chunk)
        found.append(output[..., : model.vocab_size].float().cpu())
    path = Path(config.run_dir).with_suffix(Path(config.run_dir).suffix + ".safetensors")
    path.parent.mkdir(exist_ok=True)
    save_file({"logits": torch.cat(found).contiguous()}, path)
    stop_model_parallel()
    return {"file": str(path), "dtype": str(output.dtype)}


def kernels(job: dict[str, Any], platform: Any) -> dict[str, Any]:
    """One linear layer by Transformer Engine and emulated, for ``ROUNDS`` micro-batches of growing values: relative
    differences (of norms) of output and gradients; ``..._lossless``: how far Transformer Engine's are from bf16's."""
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    precision = load_config(job["config"], job["overrides"]).precision
    recipe, fp8_format, device = str(precision.fp8), precision.fp8_format, platform.device
    form = getattr(recipes.Format, fp8_format.upper())
    wanted = {
        "delayed": lambda: recipes.DelayedScaling(fp8_format=form, amax_history_len=HISTORY, amax_compute_algo="max"),
        "tensorwise": lambda: recipes.Float8CurrentScaling(fp8_format=form),
        "blockwise": lambda: recipes.Float8BlockScaling(fp8_format=form),
    }[recipe]()  # fmt: skip
    torch.manual_seed(0)
    layer = te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16, device=device)
    weight = layer.weight.detach().clone().requires_grad_()
    forward, backward = formats(fp8_format)
    settings = Settings(recipe=recipe, forward=forward, backward=backward, history_len=HISTORY)
    scaling = ChunkScaling(("layer",), settings, Switches(), device)
    rounds = []
    for number in range(ROUNDS):
        x = (torch.randn(512, 256, device=device) * 2.0**number).bfloat16()
        grad = (torch.randn(512, 384, device=device) * 2.0**-number).bfloat16()
        mine, theirs, plain = (x.clone().requires_grad_() for _ in range(3))
        layer.weight.grad = weight.grad = None
        with te.autocast(enabled=True, recipe=wanted):
            their_output = layer(theirs, is_first_microbatch=True)
        their_output.backward(grad)

        scaling.enter(first_micro_batch=True)
        output = emulated_product(mine, weight, scaling)
        scaling.leave(output)
        output.backward(grad)

        exact_weight = weight.detach().clone().requires_grad_()
        exact = plain @ exact_weight.t()
        exact.backward(grad)
        rounds.append(
            {
                "output": apart(output, their_output),
                "grad_input": apart(mine.grad, theirs.grad),
                "grad_weight": apart(weight.grad, layer.weight.grad),
                "output_lossless": apart(their_output, exact),
                "grad_input_lossless": apart(theirs.grad, plain.grad),
                "grad_weight_lossless": apart(layer.weight.grad, exact_weight.grad),
            }
        )
    return {"rounds": rounds}


def emulated_product(x: torch.Tensor, weight: torch.Tensor, scaling: ChunkScaling) -> torch.Tensor:
    """The emulated product of the one layer in ``scaling``."""
    from megatron_syne.fp8.linear import Fp8Product

    output: torch.Tensor = Fp8Product.apply(x, weight, None, scaling, 0, Phase.RECORD)
    return output


def apart(a: Any, b: Any) -> float:
    """Relative difference of two tensors."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def marks(job: dict[str, Any], platform: Any) -> dict[str, Any]:
    """Seconds of fifty large products: until the host had queued them, by the device's marks, until they were done."""
    a = torch.randn(8192, 8192, device=platform.device)
    a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    begin = platform.mark()
    for _ in range(50):
        a @ a
    end = platform.mark()
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    waited = time.perf_counter() - began
    return {"queued": queued, "taken": platform.seconds_between(begin, end), "waited": waited}
