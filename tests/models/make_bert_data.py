"""Writes data/: a small random BERT checkpoint and the outputs that transformers computes with it.

Run it once where torch and transformers are installed; the tests need neither:

    python tests/models/make_bert_data.py
"""

import json
import shutil
from pathlib import Path

import safetensors
import torch
import transformers
from safetensors.torch import save_file

DATA = Path(__file__).parent / "data"
CONFIG = transformers.BertConfig(
    vocab_size=53,
    hidden_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=28,
    max_position_embeddings=17,
    type_vocab_size=2,
)
# Texts of 11, 7 and 1 tokens, padded with token 0; the second one has two segments.
LENGTHS = (11, 7, 1)
SEGMENT_STARTS = (11, 4, 1)


def randomise(model: torch.nn.Module) -> None:
    """Moves every weight, bias and norm away from its trivial value."""
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2 + (parameter.data == 1)


def inputs() -> dict[str, torch.Tensor]:
    """Token ids, mask and segments, each (3, 11)."""
    position = torch.arange(max(LENGTHS))
    mask = torch.stack([position < length for length in LENGTHS]).long()
    token_type_ids = torch.stack([position >= start for start in SEGMENT_STARTS]).long()
    return {
        "input_ids": torch.randint(1, CONFIG.vocab_size, mask.shape) * mask,
        "attention_mask": mask,
        "token_type_ids": token_type_ids * mask,
    }


def outputs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hidden states (3, 11, width) with and without segments, computed in float64."""
    without_types = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return {
            "hidden": model(**batch).last_hidden_state,
            "hidden_without_types": model(**without_types).last_hidden_state,
        }


def main() -> None:
    torch.manual_seed(7)
    shutil.rmtree(DATA, ignore_errors=True)
    model = transformers.BertModel(CONFIG).eval()
    randomise(model)
    model.save_pretrained(DATA / "checkpoint")
    batch = inputs()
    save_file(batch | outputs(model.double(), batch), DATA / "outputs.safetensors")
    versions = {
        module.__name__: module.__version__ for module in (torch, transformers, safetensors)
    }
    (DATA / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
