"""transformers' model of any size, with the weights of one module in memory at a time.

transformers builds the model without weights. Its body runs with every decoder layer's forward replaced by one that
only notes what it is given: the masks, rotary embeddings and flags that the model makes for that layer. They depend on
positions alone, which are the same for all samples, so they serve every micro-batch of every pass, in whatever order
the layers are taken. What depends on the tokens goes with the hidden states, see anatomy/state.py.
"""

import ctypes
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitwright.calibration.stream.anatomy.body import CACHES, Body, Given, instead, is_shared, refused
from bitwright.calibration.stream.anatomy.state import (
    HIDDEN,
    Layout,
    after_layer,
    inputs_of,
    pack,
    shared_name,
    shared_of,
)
from bitwright.calibration.stream.arithmetic import computed_by
from bitwright.calibration.stream.build import (
    build_without_weights,
    choose_device,
    choose_dtype,
    compute_exactly,
    load_config,
)
from bitwright.calibration.stream.device.memory import is_out_of_memory, memory_explained, release
from bitwright.calibration.stream.device.transfer import WeightTransfer
from bitwright.calibration.stream.key_values import PassingCache
from bitwright.calibration.stream.micro_batches import micro_batches_at_once
from bitwright.calibration.stream.observer import ProductNames, locate_matrices
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.stream.weights import ParameterReader
from bitwright.formats.errors import ConvertError

# Logits computed at once: positions times vocabulary. 32 MiB of float32, a few times over for each thread.
_LOGITS_AT_ONCE = 1 << 23

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LayerCall:
    """A layer's own forward, with what the model gives it for samples of one length, and the stand-in for its cache."""

    index: int
    layer: nn.Module
    given: Given
    cache: PassingCache

    def __call__(self, states: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, Layout]:
        """From states [n_samples, sequence_length, width] to those after the layer."""
        parts = layout.unpack(states)
        replaced: dict[str, Any] = dict(inputs_of(parts, self.index))
        shared = None
        for name, value in self.given.named().items():
            if name in CACHES:
                replaced[name] = self.cache
            elif is_shared(value):
                replaced[name] = shared = type(value)(shared_of(parts))
        given = self.given.with_inputs(replaced)
        try:
            outputs = self.layer(parts[HIDDEN], *given.args, **given.kwargs)
        except AttributeError as error:
            if error.obj is self.cache:
                raise refused(type(self.layer).__name__, f"they keep {error.name!r} in their cache") from error
            raise
        except IndexError as error:
            raise refused(type(self.layer).__name__, f"they take samples one by one ({error})") from error
        after = {HIDDEN: outputs[0] if isinstance(outputs, tuple) else outputs, **after_layer(parts, self.index)}
        for key, tensors in (shared or {}).items():
            after |= {shared_name(key, i): tensor for i, tensor in enumerate(tensors)}
        return pack(after, *states.shape[:2])


@dataclass(frozen=True)
class Arranged:
    """What a model does with samples of one length. dependent: for every layer the arguments that depend on the tokens,
    which go to it with the hidden states. before: the parameters of products before the layers."""

    calls: list[LayerCall]
    dependent: list[tuple[str, ...]]
    before: frozenset[str]


class LayerwiseModel:
    """The model without weights, the reader of its parameters, and the device that it runs on.

    config: of the text model. identity: what tells the weights from others of the same shapes. cache: what the layers
    take for theirs. output: the head, None of an encoder, which predicts nothing. layouts: of the states after that
    many layers, as far as they are known. device: None for the one that the streamable model names.
    """

    def __init__(self, streamable: StreamableModel, device: torch.device | None = None):
        self.identity, self.arithmetic, self.cache = streamable.identity, streamable.arithmetic, PassingCache()
        self.device = device or choose_device(streamable.device)
        self.dtype = choose_dtype(streamable.dtype, self.device)
        compute_exactly(self.device, self.dtype)
        self.threads = micro_batches_at_once(self.device, streamable.threads or torch.get_num_threads())
        self._transfer = WeightTransfer(self.device)
        whole = load_config(streamable.config_dir)
        self.model = build_without_weights(whole, self.dtype, self.device)
        self.config = self.model.config
        self.body = Body(self.model, self.device, self.dtype)
        self.layers, self.layouts = self.body.layers, dict[int, Layout]()
        self.output: nn.Linear | None = self.model.get_output_embeddings()
        self.parameters = ParameterReader(streamable.weights, self.model, whole)
        self._names = {module: name for name, module in self.model.named_modules()}

    def require_head(self) -> nn.Linear:
        """Raises ConvertError for a model without an output head, of which nothing that needs predictions is known."""
        if self.output is None:
            raise ConvertError(
                f"{self.config.model_type!r} makes embeddings of texts and predicts no tokens: it has no perplexity, KL"
                " divergence, sensitivity or generated text",
                "calibration",
                "choose a profile without a budget or tiers by sensitivity, and give --judge off",
            )
        return self.output

    @contextmanager
    def resident(self, module: nn.Module, weights: Weights | None = None) -> Iterator[Weights]:
        """The module with its weights in memory, these or freshly read ones; yields them by full name."""
        weights = self.read(module)[0] if weights is None else weights
        self._transfer.arrive()
        module.load_state_dict(weights, assign=True)
        try:
            yield {f"{self._names[module]}.{name}": weight for name, weight in weights.items()}
        finally:
            module.load_state_dict({name: weight.to("meta") for name, weight in weights.items()}, assign=True)

    def read(self, module: nn.Module, copies: Sequence["LayerwiseModel"] = ()) -> list[Weights]:
        """The module's weights, read once and sent to the device, and to those of the copies: a set for each."""
        models, sent = [self, *copies], [Weights() for _ in range(1 + len(copies))]
        for name, like in module.state_dict().items():
            values = self.parameters.fill(f"{self._names[module]}.{name}", self._transfer.buffer(like))
            for model, weights in zip(models, sent, strict=True):
                weights[name] = model._transfer.send(values)
        return sent

    @contextmanager
    def resident_surroundings(self, *, tables: bool) -> Iterator[Weights]:
        """Everything in the body outside of the layers with its weights in memory, the embeddings' tables as asked;
        yields them by full name."""
        names = [name for name in self.body.names if tables or name.removesuffix(".weight") not in self.body.tables]
        like = self.model.state_dict()
        with memory_explained(self.device):
            weights = {name: self.parameters.read(name, like[name], self._transfer) for name in names}
        self._transfer.arrive()
        self.model.load_state_dict(weights, strict=False, assign=True)
        try:
            with memory_explained(self.device):
                yield dict(weights)
        finally:
            unloaded = {name: weight.to("meta") for name, weight in weights.items()}
            self.model.load_state_dict(unloaded, strict=False, assign=True)

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

    def layers_in_turn(
        self,
        order: Iterable[int],
        first: Callable[[int, Weights], None],
        copies: Sequence["LayerwiseModel"] = (),
    ) -> Generator[tuple[int, list[Weights]]]:
        """One layer after the other resident, here and in the copies, with its index and its weights by full name, a
        set for each; the next one's load meanwhile.

        first: called with the first one's, alone in memory. Close the iterator when it is left early.
        """
        remaining = list(order)
        with ThreadPoolExecutor(1) as reader:

            def read(index: int) -> Future[list[Weights]]:
                return reader.submit(self.read, self.layers[index], copies)

            following = [read(index) for index in remaining[:1]]
            for index, after in zip(remaining, [*remaining[1:], None], strict=True):
                weights = self._loaded(following.pop(), index, copies)
                with ExitStack() as stack:
                    models = zip([self, *copies], weights, strict=True)
                    parameters = [stack.enter_context(of.resident(of.layers[index], own)) for of, own in models]
                    del weights
                    if index == remaining[0]:
                        first(index, parameters[0])
                    if after is not None:
                        following.append(read(after))
                    yield index, parameters
                    for own in parameters:
                        own.clear()  # whoever still holds it would keep a third layer in memory
                _return_freed_memory()

    def _loaded(self, reading: Future[list[Weights]], index: int, copies: Sequence["LayerwiseModel"]) -> list[Weights]:
        """A layer that was read while the one before it was in memory. Where there was no room for both on a GPU, it is
        read again, now that there is."""
        error = reading.exception()
        if error is None or not is_out_of_memory(error):
            return reading.result()
        release(self.device, error)
        return self.read(self.layers[index], copies)

    def layer_bytes(self) -> int:
        """Of the largest layer's weights."""
        return max(sum(p.nbytes for p in layer.parameters()) for layer in self.layers)

    def arrange(self, sequence_length: int) -> Arranged:
        """What the model does with samples of this length. Without weights of embeddings or layers."""
        with self.resident_surroundings(tables=False) as weights, ProductNames(locate_matrices(weights)) as before:
            given, dependent = self.body.arguments(sequence_length)
        layers = enumerate(zip(self.layers, given, strict=True))
        calls = [LayerCall(i, layer, of_layer, self.cache) for i, (layer, of_layer) in layers]
        return Arranged(calls, dependent, frozenset(before.seen))

    @contextmanager
    def first_states(
        self, arranged: Arranged
    ) -> Iterator[tuple[Weights, Callable[[torch.Tensor], tuple[torch.Tensor, Layout]]]]:
        """With all that stands before the layers resident, its weights by full name, and the function from tokens,
        int64 [n_samples, sequence_length], to the state before the first layer."""

        def first(tokens: torch.Tensor) -> tuple[torch.Tensor, Layout]:
            states, given = note(tokens)
            return pack(self.body.inputs(given, arranged.dependent, states), *tokens.shape)

        with self.resident_surroundings(tables=True) as weights, self.body.only_before() as note:
            yield weights, first

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """With what follows the layers resident, the function from their states [n, width] to logits [n, vocabulary]:
        the model's own forward, in which these states stand for what embeddings and layers make.

        Raises ConvertError for a model without an output head.
        """
        output = self.require_head()
        with (
            self.body.only_after() as run,
            self.resident_surroundings(tables=False) as surroundings,
            self.resident(output) as of_head,
        ):
            weights = surroundings | of_head

            def logits(states: torch.Tensor) -> torch.Tensor:
                hidden = self.layouts[len(self.layers)].unpack(states[None])[HIDDEN]
                with self.computing(weights):
                    of_one_sample: torch.Tensor = run(hidden, self._forward_tokens).logits[0]
                    return of_one_sample

            yield logits

    @contextmanager
    def head_inputs(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """With what stands between the last layer and the head resident, the function from states [n_samples,
        sequence_length, width] to what the head is given; of an encoder to what it makes."""
        given: list[torch.Tensor] = []

        def keep(inputs: torch.Tensor) -> torch.Tensor:
            given.append(inputs)
            return inputs[..., :1]  # stands for the logits, which nobody looks at

        def inputs(states: torch.Tensor) -> torch.Tensor:
            hidden = self.layouts[len(self.layers)].unpack(states)[HIDDEN]
            outputs = run(hidden, self._forward_tokens)
            last: torch.Tensor = outputs.last_hidden_state if self.output is None else given.pop()
            return last

        with ExitStack() as stack:
            run = stack.enter_context(self.body.only_after())
            stack.enter_context(self.resident_surroundings(tables=False))
            if self.output is not None:
                stack.enter_context(instead(self.output, keep))
            yield inputs

    def _forward_tokens(self, tokens: torch.Tensor) -> Any:
        return self.model(input_ids=tokens, use_cache=False)

    def logit_spans(self, n_positions: int) -> list[slice]:
        """That many positions in parts whose logits are small enough to be there at once."""
        step = max(1, _LOGITS_AT_ONCE // self.config.vocab_size)
        return [slice(start, min(start + step, n_positions)) for start in range(0, n_positions, step)]

    @contextmanager
    def workers(self, n_devices: int = 1) -> Iterator[ThreadPoolExecutor]:
        """Threads that take one micro-batch each; on a CPU an operation then keeps to its own core."""
        before = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self.threads * n_devices) as pool, memory_explained(self.device):
                yield pool
        finally:
            torch.set_num_threads(before)


def _return_freed_memory() -> None:
    """glibc keeps what the threads of a layer have freed, in pieces that the next layer's arrays do not fit: tens of MB
    more with every layer of a 7B shape."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)
