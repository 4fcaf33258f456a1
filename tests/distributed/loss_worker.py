"""The loss of a hand-made model end against plain torch, on TP ranks: ``loss_worker.py results.json``.

Each rank computes loss and gradient of its columns of the same logits, or in chunks from the same hidden states;
rank 0 writes the largest differences from ``torch.logsumexp`` over the true vocabulary by autograd in fp64.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

SEQ, BATCH, HIDDEN, VOCABULARY = 8, 3, 16, 37
CHUNK = 5  # of 24 tokens: the last chunk has 4


def main() -> None:
    from megatron_syne.platform.base import select

    platform = select("cpu")
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_syne.config.schema import MemoryConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
    from megatron_syne.models.chunked_loss import install_chunked_loss
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

    def configured(weight: float, multiple: int, chunk: int | None = None) -> RunConfig:
        return RunConfig(
            model=ModelConfig(vocab_size=VOCABULARY, make_vocab_size_divisible_by=multiple),
            parallel=ParallelConfig(tensor_model_parallel_size=dist.get_world_size()),
            train=TrainConfig(z_loss=weight),
            memory=MemoryConfig(loss_chunk_tokens=chunk),
        )

    def compare(weight: float, multiple: int, training: bool) -> dict[str, float]:
        tp, rank = dist.get_world_size(), parallel_state.get_tensor_model_parallel_rank()
        config = configured(weight, multiple)
        model = config.model
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

    class OutputLayer(torch.nn.Module):
        """What the chunked loss asks of the engine's."""

        def __init__(self, own, sequence_parallel: bool) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(own)
            self.tp_group = parallel_state.get_tensor_model_parallel_group()
            self.sequence_parallel = sequence_parallel

    def compare_chunks(
        weight: float, multiple: int, training: bool, chunk: int, sequence_parallel: bool
    ) -> dict[str, float]:
        tp, rank = dist.get_world_size(), parallel_state.get_tensor_model_parallel_rank()
        config = configured(weight, multiple, chunk)
        model = config.model
        torch.manual_seed(4)
        hidden = torch.randn(SEQ, BATCH, HIDDEN)
        matrix = torch.randn(padded_vocab_size(model, tp), HIDDEN)
        labels = torch.randint(0, VOCABULARY, (BATCH, SEQ))
        weights = torch.rand(BATCH, SEQ)

        def part(whole):
            return whole.chunk(tp)[rank] if sequence_parallel else whole

        layer = OutputLayer(matrix.chunk(tp)[rank].clone(), sequence_parallel)
        gpt = SimpleNamespace(
            post_process=True,
            training=training,
            output_layer=layer,
            share_embeddings_and_output_weights=False,
            config=SimpleNamespace(cross_entropy_loss_fusion=False),
            _postprocess=None,
        )
        install_chunked_loss(gpt, config, model)
        own = part(hidden).clone().requires_grad_()
        loss = gpt._postprocess(hidden_states=own, labels=labels)
        (loss * weights).sum().backward()

        states, rows = hidden.double().requires_grad_(), matrix.double().requires_grad_()
        logits = (states @ rows[:VOCABULARY].t()).transpose(0, 1)
        log_z = torch.logsumexp(logits, dim=-1)
        entropy = log_z - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        z_loss = weight * log_z**2 if training else 0.0
        ((entropy + z_loss) * weights).sum().backward()
        of_states, of_rows = part(states.grad), rows.grad.chunk(tp)[rank]
        differences = torch.stack(
            [
                (loss - entropy).abs().max(),
                torch.maximum((own.grad - of_states).abs().max(), (layer.weight.grad - of_rows).abs().max()),
            ]
        )
        dist.all_reduce(differences, op=dist.ReduceOp.MAX)
        return {
            "loss": float(differences[0]),
            "gradient": float(differences[1]),
            "size": float(rows.grad.abs().max()),
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
    for weight, multiple, training, sequence_parallel in product(
        (0.0, 0.05), (1, 40), (True, False), (False, True)
    ):
        for chunk in (CHUNK, 1000):
            name = (
                f"chunks of {chunk}, z_loss {weight}, multiple {multiple}, {training=}, {sequence_parallel=}"
            )
            results[name] = compare_chunks(weight, multiple, training, chunk, sequence_parallel)
    if info.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    stop_model_parallel()
    stop_distributed()


if __name__ == "__main__":
    main()
