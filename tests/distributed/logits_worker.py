"""Logits of the Megatron model in a layout: ``logits_worker.py jobs.json``; each job is a configuration with
overrides, a file of token ids (JSON, one row of equal length per micro-batch) and a ``.safetensors`` to write.
"""

from __future__ import annotations

import json
from pathlib import Path

from distributed.jobs import each_job


def main() -> None:
    for job, config, model, platform in each_job():
        import torch
        from safetensors.torch import save_file

        rows = torch.tensor(json.loads(Path(job["tokens"]).read_text()))
        logits = forward(config, model, platform, rows)
        if logits is not None:
            save_file({"logits": logits[:, :, : model.vocab_size].contiguous()}, job["out"])


def forward(config, model, platform, rows):
    """[rows, seq, padded vocabulary] on the first TP rank of the last stage, None elsewhere."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_syne.assembly import initialize
    from megatron_syne.models.gpt import build_model

    chunks = build_model(config, model, platform)
    initialize(config, model, chunks)
    for chunk in chunks:
        chunk.eval()

    def step(batches, chunk):
        tokens = next(batches)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return chunk(tokens, positions, None), lambda output, non_loss_data=True: output

    batches = [iter(rows.split(1)) for _ in chunks]
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches if len(batches) > 1 else batches[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(rows),
            seq_length=rows.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not outputs:
        return None
    whole = [tensor_parallel.gather_from_tensor_model_parallel_region(o) for o in outputs]
    return torch.cat(whole) if parallel_state.get_tensor_model_parallel_rank() == 0 else None


if __name__ == "__main__":
    main()
