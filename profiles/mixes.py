"""llama.cpp's mixes of formats, by whose names people and programs know GGUF files."""

from typing import NamedTuple


class Mix(NamedTuple):
    """bits: a weight of Llama-3.1-8B as a whole, of llama.cpp's tools/quantize/README.md. embedding, output: the
    formats of these two, of llama.cpp's src/llama-quant.cpp; tied embeddings have that of the output."""

    bits: float
    embedding: str
    output: str = "Q6_K"


MIXES = {
    "IQ1_S": Mix(2.0042, "Q2_K", "Q5_K"),
    "IQ1_M": Mix(2.1460, "Q2_K", "Q5_K"),
    "IQ2_XXS": Mix(2.3824, "Q2_K", "Q5_K"),
    "IQ2_XS": Mix(2.5882, "Q2_K", "Q5_K"),
    "IQ2_S": Mix(2.7403, "IQ3_S", "Q5_K"),
    "IQ2_M": Mix(2.9294, "IQ3_S", "Q5_K"),
    "Q2_K": Mix(3.1593, "Q2_K"),
    "IQ3_XXS": Mix(3.2548, "IQ3_S"),
    "IQ3_XS": Mix(3.4977, "IQ3_S"),
    "Q3_K_S": Mix(3.6429, "Q3_K"),
    "IQ3_M": Mix(3.7628, "IQ3_S"),
    "Q3_K_M": Mix(3.9960, "Q3_K"),
    "Q3_K_L": Mix(4.2979, "Q3_K"),
    "IQ4_XS": Mix(4.4597, "IQ4_XS"),
    "Q4_K_S": Mix(4.6672, "Q4_K"),
    "Q4_K_M": Mix(4.8944, "Q4_K"),
    "Q5_K_S": Mix(5.5704, "Q5_K"),
    "Q5_K_M": Mix(5.7036, "Q5_K"),
    "Q6_K": Mix(6.5633, "Q6_K"),
    "Q8_0": Mix(8.5008, "Q8_0", "Q8_0"),
    "F16": Mix(16.0005, "F16", "F16"),
}
"""The mixes that are common, from the smallest to the largest."""
