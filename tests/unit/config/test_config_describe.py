"""Every option is documented, and the help shows it."""

from __future__ import annotations

import dataclasses

from megatron_syne.config import schema
from megatron_syne.config.build import schema_keys
from megatron_syne.config.describe import describe_schema, field_docs


def test_no_field_lacks_documentation():
    docs = field_docs()
    classes = [each for each in vars(schema).values() if dataclasses.is_dataclass(each)]
    fields = {(each.__name__, field.name) for each in classes for field in dataclasses.fields(each)}
    assert len(fields) > 80
    assert {field for field in fields if len(docs.get(field, "")) < 5} == set()


def test_help_shows_every_option_with_type_and_default():
    text = describe_schema()
    for key, section in schema_keys():
        assert section or f"  {key}: " in text, key
    assert "  run_dir: text (required)\n" in text
    assert "  train.global_batch_size: integer = 8\n" in text
    assert "  optimizer.lr: number = 1.0e-05\n" in text
    assert "  precision.fp8: delayed | tensorwise | blockwise | null = null\n" in text
    assert "  data.sources.<name>.path: text (required)\n" in text
    assert "  data.stages.<n>.tokens: integer (required)\n" in text
    assert "  resilience.exit_signals: list of text = [SIGTERM, SIGUSR1]\n" in text
