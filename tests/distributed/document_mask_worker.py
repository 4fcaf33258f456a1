"""Logits of a sample of several documents, and of each document alone, in a layout:
``document_mask_worker.py jobs.json``. All through the trainer's own ``forward_step``.
"""

from __future__ import annotations

from distributed.jobs import each_job


def main() -> None:
    for job, config, model, platform in each_job():
        import torch
        from safetensors.torch import save_file

        from megatron_syne.assembly import initialize
        from megatron_syne.models.gpt import build_model

        chunks = build_model(config, model, platform)
        initialize(config, model, chunks)
        for chunk in chunks:
            chunk.eval()
        documents = [torch.tensor(document) for document in job["documents"]]
        whole = torch.cat(documents)[None]
        ids = torch.cat([torch.full_like(d, n) for n, d in enumerate(documents)])[None].int()
        found = {
            "with": forward(platform, chunks, whole, ids),
            "without": forward(platform, chunks, whole, None),
        }
        alone = [forward(platform, chunks, document[None], None) for document in documents]
        if found["with"] is not None:
            found["alone"] = torch.cat(alone, dim=1)
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, job["out"])


def forward(platform, chunks, tokens, document_ids):
    """[1, seq, vocabulary] on the first TP rank of the last stage of the first replica, None elsewhere."""
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_syne.training.forward import forward_step

    batch = {"tokens": tokens, "position_ids": torch.arange(tokens.shape[1])[None]}
    if document_ids is not None:
        batch["document_ids"] = document_ids

    def step(batches, chunk):
        output, _ = forward_step(platform, batches, chunk)
        return output, lambda output, non_loss_data=True: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter([batch]) for _ in chunks] if len(chunks) > 1 else iter([batch]),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not outputs:
        return None
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(outputs[0])
    first = parallel_state.get_tensor_model_parallel_rank() + parallel_state.get_data_parallel_rank() == 0
    return logits if first else None


if __name__ == "__main__":
    main()
