"""Mistral: the tensors of Llama under the same names; the sliding window has none."""

from __future__ import annotations

from megatron_syne.convert.families.llama import TABLE as TABLE
