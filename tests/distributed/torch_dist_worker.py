"""Checkpoints of the real engine against ours, in a layout: ``torch_dist_worker.py jobs.json``.

Each job builds the model of a configuration and compares every parameter of every rank, bit for bit:

load     the engine loads a checkpoint that we wrote; judged by the weights that it was made from
save     the engine saves (with the optimizer's state, where asked, after a step that changes the weights); what
         we open is judged by the live parameters
save_pt  the same with Megatron-LM's ``model_optim_rng.pt`` files
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from distributed.jobs import each_job


def main() -> None:
    found = {}
    for job, config, model, platform in each_job():
        from megatron_syne.models.gpt import build_model

        found[job["name"]] = run(job, config, build_model(config, model, platform))
    Path(sys.argv[1]).with_name(f"found_{os.environ['RANK']}.json").write_text(json.dumps(found))


def run(job, config, chunks):
    """(number of parameters compared, names of those that differ) on this rank."""
    import torch.distributed as dist

    from megatron_syne.convert.weights import open_source
    from megatron_syne.models.gpt import load_weights

    source, path = Path(job["source"]), Path(job["path"])
    multiple = config.model.make_vocab_size_divisible_by
    if job["do"] == "load":
        load(path, chunks)
        judged = open_source(source, multiple)
    else:
        load_weights(chunks, open_source(source, multiple).parameter)
        optimizer = step(config, chunks) if job.get("optimizer") else None
        save_pt(path, chunks) if job["do"] == "save_pt" else save(path, chunks, optimizer)
        dist.barrier()
        judged = opened(job["do"], path, source)
    return compare(chunks, judged, multiple)


def opened(kind, path, source):
    from megatron_syne.convert.formats.megatron_pt import open_megatron_pt
    from megatron_syne.convert.formats.torch_dist import open_torch_dist
    from megatron_syne.convert.weights import WeightSource

    stored = (open_megatron_pt if kind == "save_pt" else open_torch_dist)(path, hf_config=source)
    return WeightSource(stored, stored.model)


def compare(chunks, judged, multiple):
    from dataclasses import replace

    import torch
    from megatron.core import parallel_state

    from megatron_syne.models.gpt import named_parameters

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    judged.model = replace(judged.model, make_vocab_size_divisible_by=multiple)
    different, compared = [], 0
    for chunk in chunks:
        for name, live in named_parameters(chunk):
            wanted = judged.parameter(name, rank, size).to(live.dtype)
            rows = len(live)
            if name.split(".")[0] in ("embedding", "output_layer"):  # padding is trained as well, and cut off
                rows = max(0, min(rows, judged.model.vocab_size - rank * rows))
            compared += 1
            if wanted.shape != live.shape or not torch.equal(wanted[:rows], live.detach()[:rows]):
                different.append(name)
    judged.close()
    return compared, different


def load(path, chunks):
    """The engine's own loading, as strict as it is by default, and every module's."""
    import torch
    from megatron.core import dist_checkpointing

    from megatron_syne.checkpoint.manager import model_state, put_weights

    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.constant_(parameter, 7.0)
    put_weights(chunks, dist_checkpointing.load(model_state(chunks), str(path)))


def save(path, chunks, optimizer):
    """By megatron-core's own functions, as Megatron-LM does it, not by ours."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_syne.checkpoint.manager import _metadata, model_state

    if dist.get_rank() == 0:
        path.mkdir(parents=True)
    dist.barrier()
    state = model_state(chunks)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=False, metadata=_metadata(False))
    dist_checkpointing.save(state, str(path))


def save_pt(path, chunks):
    """As Megatron-LM's ``save_checkpoint`` with ``--ckpt-format torch``; arguments and states are such as it
    holds there."""
    import argparse
    import random
    from collections import OrderedDict

    import numpy as np
    import torch
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    from megatron_syne.models.gpt import unwrap

    if parallel_state.get_data_parallel_rank(with_context_parallel=True):
        return
    tp, pp = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    models = [unwrap(chunk).state_dict_for_save_checkpoint() for chunk in chunks]
    engine = unwrap(chunks[0]).config
    arguments = argparse.Namespace(
        num_layers=engine.num_layers,
        hidden_size=engine.hidden_size,
        normalization=engine.normalization,
        params_dtype=engine.params_dtype,
        attention_backend=AttnBackend.auto,
        model_type=ModelType.encoder_or_decoder,
        save=Path("/checkpoints"),
        untie_embeddings_and_output_weights=not unwrap(chunks[0]).share_embeddings_and_output_weights,
    )
    moments = {index: {"step": 3, "exp_avg": torch.randn(5)} for index in range(2)}
    state = {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": 100,
        **({"model": models[0]} if len(models) == 1 else {f"model{i}": m for i, m in enumerate(models)}),
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]},
        "rng_state": [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "rng_tracker_states": OrderedDict(default=torch.get_rng_state()),
            }
        ],
    }
    folder = path / "iter_0000100" / (f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if stages > 1 else ""))
    folder.mkdir(parents=True)
    torch.save(state, folder / "model_optim_rng.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("100")


def step(config, chunks):
    """An optimizer that has made a step with random gradients; the weights are now others."""
    import torch

    from megatron_syne.training.optimizer import build_optimizer, wrap_ddp

    wrapped = wrap_ddp(chunks, config)
    optimizer = build_optimizer(wrapped, config)
    for chunk in wrapped:
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(torch.randn_like(parameter.main_grad))
        chunk.finish_grad_sync()
    optimizer.step()
    for chunk, ddp in zip(chunks, wrapped, strict=True):
        assert ddp.module is chunk
    return optimizer


if __name__ == "__main__":  # checkpoint saving starts helper processes that import this file again
    main()
