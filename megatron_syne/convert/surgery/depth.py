"""More layers: LLaMA-Pro's block expansion and SOLAR's depth up-scaling.

Both only say from which old layer each new one is copied, so their cost is that of a copy.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_syne.convert.pieces import Span
from megatron_syne.convert.streams import Bytes, Weights
from megatron_syne.convert.surgery.derived import Derived
from megatron_syne.convert.surgery.record import RECORD, extended, record_of
from megatron_syne.convert.table import at_layer, hf_tensors, table_of
from megatron_syne.errors import ConfigError, DataError

# What a layer adds to the residual stream leaves through these two; with them zero it adds nothing.
_LAST = (".self_attention.linear_proj.", ".mlp.linear_fc2.")


def expand_blocks(weights: Weights, *, every: int | None = None, num_new: int | None = None) -> Weights:
    """Weights with a copy after every ``every``-th layer, that computes nothing yet (LLaMA-Pro).

    Give ``every``, or ``num_new`` copies spread evenly. In a copy the attention's output projection and the
    second feed-forward matrix (Hugging Face: ``o_proj``, ``down_proj``, and biases that they may have) are
    zero, so the residual stream passes it unchanged and the whole computes the same function; all else is
    copied, so that training starts from there. After arXiv 2401.02415 and TencentARC/LLaMA-Pro,
    ``scripts/block_expansion.py``: 32 layers, ``num_new`` 8, ``every`` 4.

    Raises ConfigError where the numbers do not suit the layers.
    """
    layers = weights.model.num_layers
    assert layers is not None, "resolve_model first"
    if (every is None) == (num_new is None):
        raise ConfigError("expand_blocks: give every or num_new, one of the two")
    if num_new is not None:
        if num_new < 1 or layers % num_new:
            possible = [str(n) for n in range(1, layers + 1) if layers % n == 0]
            raise ConfigError(
                f"num_new: {num_new} copies cannot be spread evenly over {layers} layers; "
                f"possible: {', '.join(possible)}"
            )
        every = layers // num_new
    assert every is not None
    if not 1 <= every <= layers:
        raise ConfigError(f"every: {every} is not within 1 and the model's {layers} layers")
    sources: list[int] = []
    new: list[int] = []
    for layer in range(layers):
        sources.append(layer)
        if (layer + 1) % every == 0:
            new.append(len(sources))
            sources.append(layer)
    return _Deeper(weights, "expand-blocks", {"every": every}, sources, new, silent=new)


def upscale_depth(weights: Weights, *, layers_kept: int) -> Weights:
    """The first ``layers_kept`` layers followed by the last ``layers_kept`` (SOLAR, arXiv 2312.15166).

    The paper's n = 32 layers with m = 8 dropped from either copy are ``layers_kept=24`` and give 48. New are
    those of the second part that the first part holds already. The result must be trained before use: it
    does not compute the same function. Raises ConfigError where nothing would be gained or layers lost.
    """
    layers = weights.model.num_layers
    assert layers is not None, "resolve_model first"
    if not layers < 2 * layers_kept <= 2 * layers:
        raise ConfigError(
            f"layers_kept: {layers_kept} of {layers} layers: expected {layers // 2 + 1} to {layers}, "
            f"so that the two parts overlap and no layer is lost"
        )
    sources = [*range(layers_kept), *range(layers - layers_kept, layers)]
    new = [i for i in range(layers_kept, len(sources)) if sources[i] < layers_kept]
    return _Deeper(weights, "upscale-depth", {"layers_kept": layers_kept}, sources, new, silent=[])


class _Deeper(Derived):
    """Layer ``i`` is a copy of the input's layer ``sources[i]``; of the ``silent`` ones the last matrices are
    zero."""

    def __init__(
        self,
        weights: Weights,
        operation: str,
        parameters: dict[str, Any],
        sources: list[int],
        new: list[int],
        silent: list[int],
    ) -> None:
        before = weights.model.num_layers
        super().__init__(
            operation,
            {**parameters, "num_layers": [before, len(sources)], "new_layers": new},
            {"source": weights},
        )
        self.source = weights
        self.model = dataclasses.replace(weights.model, num_layers=len(sources))
        self.config = deeper_config(weights.config, sources)
        self.origin: dict[str, str | None] = {}
        """The input's tensor that it is a copy of; None for one of zeros."""
        self.like: dict[str, str] = {}
        """The input's tensor of the same shape and format."""
        self._pair_layers(sources, silent)
        self.shapes = hf_tensors(self.model)
        for name in self.shapes:
            self.like.setdefault(name, name)
            self.origin.setdefault(name, name)
        self.dtypes = {name: weights.dtypes[self.like[name]] for name in self.shapes}
        record = record_of(weights)
        earlier = set(record["new_layers"])
        listed = [i for i, layer in enumerate(sources) if i in new or layer in earlier]
        self.documents[RECORD] = extended(record, operation, self.parameters, new_layers=listed)

    def _pair_layers(self, sources: list[int], silent: list[int]) -> None:
        for layer, origin in enumerate(sources):
            for entry in table_of(self.model).layer:
                zero = layer in silent and any(part in entry.megatron for part in _LAST)
                for name, old in zip(at_layer(entry, layer).hf, at_layer(entry, origin).hf, strict=True):
                    self.like[name], self.origin[name] = old, None if zero else old

    def read(self, name: str, rows: Span, out: Bytes) -> None:
        """See :class:`Weights`."""
        origin = self.origin[name]
        if origin is None:
            out[:] = 0
        else:
            self.source.read(origin, rows, out)


def deeper_config(config: dict[str, Any], sources: list[int]) -> dict[str, Any]:
    """A ``config.json`` for layers copied from ``sources``: their number, and what is said layer by layer.

    Raises DataError where the layers' kinds cannot be said for the new order.
    """
    before = config["num_hidden_layers"]
    found = {**config, "num_hidden_layers": len(sources)}
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != before:
            raise DataError(f"config.json: layer_types: expected a list of {before} kinds, found {kinds!r}")
        found["layer_types"] = [kinds[layer] for layer in sources]
    full = config.get("max_window_layers")  # Qwen2: layers from there on attend to a window only
    if full is not None:
        has_full = [layer < full for layer in sources]
        if config.get("use_sliding_window") and has_full != sorted(has_full, reverse=True):
            raise DataError(
                f"config.json: max_window_layers {full}: in the new order of layers those with a sliding window "
                f"do not come last, which this key cannot say"
            )
        found["max_window_layers"] = max(full - before, 0) + sum(has_full)
    return found
