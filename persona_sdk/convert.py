"""GGUF to a transformers folder: ``python -m persona_sdk.convert model.gguf folder``.

transformers reads a GGUF file into plain float32 weights but still calls the result quantised and refuses
to save it, hence the fields removed below. De-quantising is element-wise float32 arithmetic, so the same
file gives the same bits, and the same fingerprint, on every machine.
"""

import sys
from pathlib import Path
from typing import Any


def gguf_to_safetensors(gguf: Path, folder: Path) -> None:
    """Write the model, its tokenizer and its chat template as a folder that `from_pretrained` reads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    tokenizer.model_max_length = model.config.max_position_embeddings
    for key in (
        "name_or_path",
        "is_local",
        "local_files_only",
    ):  # where the file lay says nothing to a reader
        tokenizer.init_kwargs.pop(key, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    gguf_to_safetensors(Path(sys.argv[1]), Path(sys.argv[2]))
