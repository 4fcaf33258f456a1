"""Bytes that a forward pass keeps for its backward pass, and of the optimizer's state: ``memory_worker.py jobs.json``.

Per job: ``activations`` = storages saved for the backward pass of one micro-batch, weights left out, as they are
when the forward pass has ended; ``state`` = the optimizer's state after one step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from distributed.jobs import each_job


def main() -> None:
    results = {}
    for job, config, model, platform in each_job():
        import torch
        from megatron.core.distributed import finalize_model_grads

        from megatron_syne.models.gpt import build_model, unwrap
        from megatron_syne.training.optimizer import build_optimizer, connect, wrap_ddp

        chunks = wrap_ddp(build_model(config, model, platform), config)
        optimizer = build_optimizer(chunks, config)
        connect(chunks, optimizer, config)
        weights = {p.untyped_storage()._cdata for p in unwrap(chunks[0]).parameters()}
        saved: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        tokens = torch.arange(2 * config.data.seq_length).reshape(2, -1)
        chunks[0].zero_grad_buffer()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = chunks[0](tokens, tokens, None, labels=tokens).float().mean()
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
        activations = sum(size for key, size in storages.items() if key not in weights)
        saved.clear()
        loss.backward()
        finalize_model_grads(chunks)
        optimizer.step()
        inner = optimizer.chained_optimizers[0].optimizer
        tensors = [t for state in inner.state.values() for t in state.values()]
        results[job["name"]] = {
            "activations": activations,
            "state": sum(t.nbytes for t in tensors),
            "loss": loss.item(),
        }
    Path(sys.argv[1]).with_name("results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
