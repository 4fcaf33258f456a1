"""One linear layer in Transformer Engine's FP8 and emulated: ``fp8_kernels_worker.py recipe format``.

Prints one JSON list: per round the relative differences (of norms) of output, gradient of the input and of the
weight; and ``..._lossless``: how far Transformer Engine's are from bf16's without FP8.
"""

from __future__ import annotations

import json
import sys

HISTORY = 16


def main() -> None:
    recipe, fp8_format = sys.argv[1:]
    from megatron_syne.platform.base import select

    device = select("cuda").device
    import torch
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    from megatron_syne.fp8.emulation import ChunkScaling, Phase, Settings, Switches
    from megatron_syne.fp8.linear import Fp8Product
    from megatron_syne.fp8.recipes import formats

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

    def apart(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.float() - b.float()).norm() / b.float().norm())

    result = []
    for number in range(4):
        x = (torch.randn(512, 256, device=device) * 2.0**number).bfloat16()
        grad = (torch.randn(512, 384, device=device) * 2.0**-number).bfloat16()
        mine, theirs, plain = (x.clone().requires_grad_() for _ in range(3))
        layer.weight.grad = weight.grad = None
        with te.fp8_autocast(enabled=True, fp8_recipe=wanted):
            their_output = layer(theirs, is_first_microbatch=True)
        their_output.backward(grad)

        scaling.enter(first_micro_batch=True)
        output = Fp8Product.apply(mine, weight, None, scaling, 0, Phase.RECORD)
        scaling.leave(output)
        output.backward(grad)

        exact_weight = weight.detach().clone().requires_grad_()
        exact = plain @ exact_weight.t()
        exact.backward(grad)
        result.append(
            {
                "output": apart(output, their_output),
                "grad_input": apart(mine.grad, theirs.grad),
                "grad_weight": apart(weight.grad, layer.weight.grad),
                "output_lossless": apart(their_output, exact),
                "grad_weight_lossless": apart(layer.weight.grad, exact_weight.grad),
            }
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
