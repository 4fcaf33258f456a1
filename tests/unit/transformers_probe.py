"""What one version of transformers makes of some folders: run by ``test_transformers5.py`` in a process.

stdin: ``{"logits": {name: folder}, "save": {name: [from, to]}}``; stdout: the version, where it was imported
from, and for each folder the logits (fp32) of one fixed sequence whose positions lie far apart, so that every
frequency of the rotary embedding counts.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers

LENGTH, STRIDE = 24, 611


def main() -> None:
    """stdin -> stdout."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    request = json.load(sys.stdin)
    answer = {"version": transformers.__version__, "file": transformers.__file__, "logits": {}}
    tokens = torch.arange(3, 3 + LENGTH)[None] * 7 % 60
    positions = torch.arange(LENGTH)[None] * STRIDE
    for name, folder in request["logits"].items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
        with torch.no_grad():
            logits = model(input_ids=tokens, position_ids=positions).logits
        answer["logits"][name] = logits.flatten().tolist()
    for source, target in request.get("save", {}).values():
        model = transformers.AutoModelForCausalLM.from_pretrained(source, local_files_only=True)
        model.save_pretrained(target)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
