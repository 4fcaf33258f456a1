"""What is known of sources before they are opened: the token counts in their manifests. No torch."""

from __future__ import annotations

from pathlib import Path

from megatron_syne.config.schema import RunConfig
from megatron_syne.data.mixture.supply import usable_tokens
from megatron_syne.errors import SyneError
from megatron_syne.models.json_file import read_json


def source_token_counts(config: RunConfig) -> tuple[dict[str, int], list[str]]:
    """Tokens of one epoch of each training source by its manifest ``<prefix>.json``, its subset applied to
    within one document; and a remark for each source without one."""
    counts: dict[str, int] = {}
    remarks = []
    for name, source in config.data.sources.items():
        manifest = Path(source.path + ".json")
        if not manifest.exists():
            remarks.append(f"{name}: no manifest {manifest}; run tools/prepare_data.py for this source")
            continue
        try:
            tokens = read_json(manifest).get("counts", {}).get("tokens")
        except (SyneError, OSError, AttributeError) as error:
            remarks.append(f"{name}: {error}")
            continue
        if isinstance(tokens, int) and not isinstance(tokens, bool):
            counts[name] = usable_tokens(source, tokens)
        else:
            remarks.append(f"{name}: {manifest} has no counts.tokens")
    return counts, remarks
