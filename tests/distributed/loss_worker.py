"""The loss of a hand-made model end against plain torch, on TP ranks: ``loss_worker.py results.json``.

Each rank computes loss and gradient of its columns of the same logits; rank 0 writes the largest differences from
``torch.logsumexp`` and ``cross_entropy`` over the true vocabulary by autograd.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

SEQ, BATCH, VOCABULARY = 7, 3, 37


def main() -> None:
    from megatron_syne.platform.base import select

    platform = select("cpu")
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_syne.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
    from megatron_syne.models.config import padded_vocab_size
    from megatron_syne.models.loss import install_loss
    from megatron_syne.parallel.ranks import rank_info
    from megatron_syne.parallel.setup import (
        start_distributed,
        start_model_parallel,
        stop_distributed,
        stop_model_parallel,
    )

    def engine(labels, logits):
        return vocab_parallel_cross_entropy(logits, labels.t().contiguous()).t()

    def compare(weight: float, multiple: int, training: bool) -> dict[str, float]:
        tp, rank = dist.get_world_size(), parallel_state.get_tensor_model_parallel_rank()
        model = ModelConfig(vocab_size=VOCABULARY, make_vocab_size_divisible_by=multiple)
        config = RunConfig(
            model=model,
            parallel=ParallelConfig(tensor_model_parallel_size=tp),
            train=TrainConfig(z_loss=weight),
        )
        padded = padded_vocab_size(model, tp)
        torch.manual_seed(3)
        whole = torch.randn(SEQ, BATCH, padded) * 4 + 5
        labels = torch.randint(0, VOCABULARY, (BATCH, SEQ))
        weights = torch.rand(BATCH, SEQ)

        own = whole.chunk(tp, dim=-1)[rank].clone().requires_grad_()
        gpt = SimpleNamespace(post_process=True, training=training, compute_language_model_loss=engine)
        install_loss(gpt, config, model)
        loss = gpt.compute_language_model_loss(labels, own * 1.0)
        (loss * weights).sum().backward()

        reference = whole[..., :VOCABULARY].double().requires_grad_()
        log_z = torch.logsumexp(reference, dim=-1).t()
        entropy = log_z - reference.transpose(0, 1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        z_loss = weight * log_z**2 if training else 0.0
        ((entropy + z_loss) * weights).sum().backward()
        gradient = torch.zeros(SEQ, BATCH, padded, dtype=torch.float64)
        gradient[..., :VOCABULARY] = reference.grad
        differences = torch.stack(
            [(loss - entropy).abs().max(), (own.grad - gradient.chunk(tp, dim=-1)[rank]).abs().max()]
        )
        dist.all_reduce(differences, op=dist.ReduceOp.MAX)
        return {
            "loss": float(differences[0]),
            "gradient": float(differences[1]),
            "size": float(gradient.abs().max()),
        }

    info = rank_info()
    config = RunConfig(parallel=ParallelConfig(tensor_model_parallel_size=info.world_size))
    platform.start(info.local_rank, config.precision)
    start_distributed(platform, info, 120)
    start_model_parallel(config.parallel, 1)
    results = {
        f"z_loss {weight}, multiple {multiple}, {'training' if training else 'validation'}": compare(
            weight, multiple, training
        )
        for weight in (0.0, 0.05)
        for multiple in (1, 8, 40)  # 40: under TP 2 the last rank holds nothing but padding
        for training in (True, False)
    }
    if info.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    stop_model_parallel()
    stop_distributed()


if __name__ == "__main__":
    main()
