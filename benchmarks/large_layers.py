"""Write a random Llama with the layer shapes of a 7B model but few layers: for speed, not for quality.

    python benchmarks/large_layers.py FOLDER --layers 4

Hidden size 4096, feed-forward 11008, 32 heads; a vocabulary of 4096, so that the head is one more layer and
the embedding small. Weights are drawn from one seed; the tokenizer, of 2048 tokens, is that of `tiny`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gammac.models_zoo.fetch import fetch


def write(folder: Path, layers: int, seed: int = 0) -> None:
    """Write the model in bfloat16 safetensors, in transformers' form."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=2048,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(fetch("tiny")).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    write(args.folder, args.layers)
