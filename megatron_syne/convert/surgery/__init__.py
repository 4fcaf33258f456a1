"""Operations on weights: each takes :class:`~megatron_syne.convert.streams.Weights` and gives others, whose rows
are computed when they are read. They are written like any weights, so memory stays bounded and the certificate
keeps the chain. No torch.
"""
