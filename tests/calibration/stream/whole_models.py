"""Streams held against whole models: what a layer stream of a checkpoint sees, and what transformers computes of it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from bitwright.calibration.control import PassControl
from bitwright.calibration.stream.backward import GradientStream
from bitwright.calibration.stream.forward import LayerStream
from tests.calibration.stream.streaming import DictSource, on_cpu
from tests.calibration.stream.test_backward import Gradients

# Long enough for the windows, the chunks of state spaces and the indexers of the tiny models; a micro-batch holds two.
N_SAMPLES, N_TOKENS = 3, 70

# Parameters of two and three dimensions in no matrix product: kernels of depthwise convolutions, decays, biases of
# experts, and what routers and attention add.
NO_PRODUCT = re.compile(r"conv|A_log$|bias$|_norm\.weight$|sink|correction")


# What the Hub calls the classes of some models -> what transformers calls them.
_OWN_NAMES = {
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
    "KimiK25ForConditionalGeneration": "Kimi_K25ForConditionalGeneration",
}


def stored_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor under its name in the files, float32."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor.astype(np.float32) for file in files for name, tensor in load_file(file).items()}


def load_text_model(directory: Path) -> torch.nn.Module:
    """The whole model as transformers itself loads it, by the class that config.json names; its experts one by one."""
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    options = dict(dtype=torch.float32, experts_implementation="eager")
    model = getattr(transformers, _OWN_NAMES.get(architecture, architecture))
    try:
        return model.from_pretrained(directory, attn_implementation="sdpa", **options).eval()
    except ValueError:  # it knows its own attention only
        return model.from_pretrained(directory, attn_implementation="eager", **options).eval()


@dataclass
class Streamed:
    """A finished forward stream that has kept the input of every layer, and the products that it has shown."""

    stream: LayerStream
    control: PassControl
    products: dict[tuple[str, int], int]

    @property
    def has_head(self) -> bool:
        return self.stream.output is not None

    def outputs(self) -> torch.Tensor:
        """Logits, or of an encoder its last hidden states: [n_samples, n_tokens, ...]."""
        if self.has_head:
            with self.stream.head() as head, torch.inference_mode():
                return torch.stack([head(self.stream.hidden_states(i, i + 1)[0]) for i in range(N_SAMPLES)])
        with self.stream.head_inputs() as last, torch.inference_mode():
            return last(self.stream.hidden_states(0, N_SAMPLES))

    def unseen(self) -> set[str]:
        """The matrices of the layers that no product has shown, without numbers of layers."""
        layers = tuple(f"{self.stream._names[layer]}." for layer in self.stream.layers)
        shown = {parameter for parameter, _ in self.products}
        matrices = {name for name, parameter in self.stream.model.named_parameters() if parameter.dim() in (2, 3)}
        return {
            re.sub(r"\.\d+\.", ".#.", name, count=1)
            for name in matrices - shown
            if name.startswith(layers) and not NO_PRODUCT.search(name)
        }

    def gradients(self) -> dict[str, torch.Tensor]:
        """Parameter -> [n_matrices, n_rows, n_columns] of the product, of the cross-entropy with the next tokens."""
        observed = Gradients()
        GradientStream(self.stream, self.control.within("backward"), observed, labels="text").run()
        return observed.sums


class Products:
    """An observer that counts what every matrix is shown, and checks that inputs and outputs fit it."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], int] = {}

    def fresh(self, first: int) -> "Products":
        return Products()

    def observe(self, parameter, matrix, n_matrices, inputs, outputs) -> None:
        assert matrix < n_matrices
        assert outputs is None or inputs.shape[:-1] == outputs.shape[:-1]
        place = parameter, matrix
        self.rows[place] = self.rows.get(place, 0) + inputs.numel() // inputs.shape[-1]

    def merge(self, other: "Products") -> None:
        for place, rows in other.rows.items():
            self.rows[place] = self.rows.get(place, 0) + rows

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {}

    def load_arrays(self, arrays) -> None:
        pass


def tokens_of(directory: Path) -> np.ndarray:
    config = json.loads((directory / "config.json").read_text())
    vocabulary = config.get("text_config", config)["vocab_size"]
    return np.random.default_rng(0).integers(3, vocabulary, (N_SAMPLES, N_TOKENS)).astype(np.int32)


def streamed(directory: Path, work_dir: Path) -> Streamed:
    model, control = on_cpu(DictSource(stored_tensors(directory)), directory, work_dir)
    products = Products()
    stream = LayerStream(model, tokens_of(directory), control.within("forward"), observer=products, keep=True)
    stream.run()
    return Streamed(stream, control, products.rows)


def whole_outputs(model: torch.nn.Module, directory: Path, has_head: bool) -> torch.Tensor:
    tokens = torch.from_numpy(tokens_of(directory)).long()
    with torch.inference_mode():
        outputs = model(input_ids=tokens) if not has_head else model(input_ids=tokens, use_cache=False)
    return outputs.logits if has_head else outputs.last_hidden_state


def whole_gradients(model: torch.nn.Module, directory: Path) -> dict[str, torch.Tensor]:
    """By autograd: parameter -> gradient of the sum of cross-entropies."""
    for sample in torch.from_numpy(tokens_of(directory)).long():
        logits = model(input_ids=sample[None], use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], sample[1:], reduction="sum").backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def relative_error(values: torch.Tensor, reference: torch.Tensor) -> float:
    scale = float(torch.linalg.vector_norm(reference))
    return float(torch.linalg.vector_norm(values - reference)) / scale if scale else float(values.abs().max())
