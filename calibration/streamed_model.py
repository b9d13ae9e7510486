"""transformers' model of any size, with the weights of one module in memory at a time.

transformers builds the model without weights. Its body runs once, on a sample of zeros, with every decoder layer's
forward replaced by one that only notes what it is given: the masks, rotary embeddings and flags that the model makes
for that layer. They depend on positions alone, which are the same for all samples, so they serve every micro-batch of
every pass, in whatever order the layers are taken.
"""

import ctypes
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from calibration.arithmetic import Arithmetic, computed_by
from calibration.choices import Dtype
from calibration.key_values import PassingCache
from calibration.model import build_without_weights, choose_device, choose_dtype, load_config
from calibration.observer import locate_matrices
from calibration.weights import ParameterReader, WeightSource

# Logits computed at once: positions times vocabulary. 32 MiB of float32, a few times over for each thread.
_LOGITS_AT_ONCE = 1 << 23

Weights = dict[str, torch.Tensor]
# From hidden states [n_samples, sequence_length, width] to the same after the layer.
LayerCall = Callable[[torch.Tensor], torch.Tensor]


class StreamedModel:
    """The model, the reader of its parameters, and the device that it runs on.

    source: the weights. config_dir: a directory with config.json.
    device: "auto", "cpu", "cuda" or "mps". dtype: of weights and states, see choose_dtype. threads: CPU threads, None
    for one a core.
    arithmetic: how products with matrices are computed and caches kept, None for as torch does it.
    cache: what the layers take for theirs.
    """

    def __init__(
        self,
        source: WeightSource,
        config_dir: Path,
        *,
        device: str = "auto",
        dtype: Dtype = "auto",
        threads: int | None = None,
        arithmetic: Arithmetic | None = None,
    ):
        self.arithmetic, self.cache = arithmetic, PassingCache()
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.threads = (threads or torch.get_num_threads()) if self.device.type == "cpu" else 1
        self.config = load_config(config_dir)
        self.model = build_without_weights(self.config, self.dtype, self.device)
        self.layers: list[nn.Module] = list(self.model.base_model.layers)
        self.embedding: nn.Embedding = self.model.get_input_embeddings()
        self.final_norm: nn.Module = self.model.base_model.norm
        self.output: nn.Linear = self.model.get_output_embeddings()
        self.parameters = ParameterReader(source)
        self._names = {module: name for name, module in self.model.named_modules()}

    @contextmanager
    def resident(self, module: nn.Module, weights: Weights | None = None) -> Iterator[Weights]:
        """The module with its weights in memory, these or freshly read ones; yields them by full name."""
        weights = self.read(module) if weights is None else weights
        module.load_state_dict(weights, assign=True)
        try:
            yield {f"{self._names[module]}.{name}": weight for name, weight in weights.items()}
        finally:
            module.load_state_dict({name: weight.to("meta") for name, weight in weights.items()}, assign=True)

    def read(self, module: nn.Module) -> Weights:
        """The module's weights, on the device."""
        return {
            name: self.parameters.read(f"{self._names[module]}.{name}", like, self.device)
            for name, like in module.state_dict().items()
        }

    @contextmanager
    def computing(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """In this thread, products with these parameters, by full name, are computed as the arithmetic does, and keys
        and values are what it keeps of them."""

        def names_of(parameter: str, matrix: int, n_matrices: int) -> Sequence[str]:
            stored = self.parameters.matrices(parameter, n_matrices)
            return stored[matrix if len(stored) > 1 else 0]

        with ExitStack() as stack:
            if self.arithmetic is not None:
                stack.enter_context(computed_by(self.arithmetic, locate_matrices(weights), names_of))
                stack.enter_context(self.cache.handled_by(self.arithmetic.cached))
            yield

    def layers_in_turn(self, order: Iterable[int]) -> Generator[tuple[int, Weights]]:
        """One layer after the other resident, with its index and its weights; the next one's load meanwhile.

        Close the iterator when it is left early.
        """
        remaining = list(order)
        with ThreadPoolExecutor(1) as reader:
            following = [reader.submit(self.read, self.layers[index]) for index in remaining[:1]]
            for index, after in zip(remaining, [*remaining[1:], None], strict=True):
                weights = following.pop().result()
                if after is not None:
                    following.append(reader.submit(self.read, self.layers[after]))
                with self.resident(self.layers[index], weights) as parameters:
                    del weights
                    yield index, parameters
                    parameters.clear()  # whoever still holds it would keep a third layer in memory
                _return_freed_memory()

    def layer_calls(self, sequence_length: int) -> list[LayerCall]:
        """Every layer's own forward, with the arguments that the model gives it for samples of this length, and the
        stand-in for its cache."""
        calls: list[LayerCall] = []

        def note(forward: Callable[..., torch.Tensor], sample: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            if "past_key_values" in kwargs:
                kwargs["past_key_values"] = self.cache
            calls.append(lambda states: forward(states, *args, **kwargs))
            return sample

        sample = torch.zeros(1, sequence_length, self.config.hidden_size, dtype=self.dtype, device=self.device)
        for layer in self.layers:
            layer.forward = partial(note, layer.forward)
        try:
            # Not inference mode: what the model makes in it cannot serve a pass that computes gradients.
            with self.resident(self.final_norm), torch.no_grad():
                self.model.base_model(inputs_embeds=sample, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward  # the class's own shows again
        return calls

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """With final norm and output head resident, the function from hidden states [n, width] to logits
        [n, vocabulary]: the model's own forward, in which the norm alone stands for the body."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        def normed(*, inputs_embeds: torch.Tensor, **_) -> MoeModelOutputWithPast:
            return MoeModelOutputWithPast(last_hidden_state=self.final_norm(inputs_embeds))

        self.model.base_model.forward = normed
        try:
            with self.resident(self.final_norm), self.resident(self.output) as weights:

                def logits(states: torch.Tensor) -> torch.Tensor:
                    with self.computing(weights):
                        return self.model(inputs_embeds=states[None], use_cache=False).logits[0]

                yield logits
        finally:
            del self.model.base_model.forward

    def logit_spans(self, n_positions: int) -> list[slice]:
        """That many positions in parts whose logits are small enough to be there at once."""
        step = max(1, _LOGITS_AT_ONCE // self.config.vocab_size)
        return [slice(start, min(start + step, n_positions)) for start in range(0, n_positions, step)]

    @contextmanager
    def workers(self) -> Iterator[ThreadPoolExecutor]:
        """Threads that take one micro-batch each; on a CPU an operation then keeps to its own core."""
        before = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self.threads) as pool:
                yield pool
        finally:
            torch.set_num_threads(before)


def _return_freed_memory() -> None:
    """glibc keeps what the threads of a layer have freed, in pieces that the next layer's arrays do not fit: tens of MB
    more with every layer of a 7B shape."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
