"""A model's body taken apart: its layers, and what stands before and after them.

The layers are found, and everything else is the body's own forward, run with other forwards in the place of the
layers': one that notes what a layer is given and ends at the last, which is what stands before them; or one that puts
the given states in the place of what the first layer makes, which is what stands after them. Scales of embeddings,
positions, inputs of single layers, norms and projections at the end: all of that is the model's own code.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from bitwright.calibration.stream.anatomy.state import HIDDEN, input_name
from bitwright.formats.errors import ConvertError

# What layers call their cache.
CACHES = ("past_key_values", "cache_params", "layer_past")
# What layers call their first argument where it is given by name.
_STATES = "hidden_states"


@dataclass
class Given:
    """What the body gives a layer beside the hidden states. args: by position, from the second on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def named(self) -> dict[str, Any]:
        return {str(i): value for i, value in enumerate(self.args)} | self.kwargs

    def with_inputs(self, inputs: Mapping[str, Any]) -> "Given":
        """With other values of arguments, by the names that `named` gives them."""
        args = tuple(inputs.get(str(i), value) for i, value in enumerate(self.args))
        return Given(args, {name: inputs.get(name, value) for name, value in self.kwargs.items()})


@dataclass
class _Noted:
    """What the layers were given, and the hidden states that the first one was."""

    states: torch.Tensor | None = None
    given: list[Given] = field(default_factory=list)


# From tokens to the first layer's input, and what every layer is given.
Note = Callable[[torch.Tensor], tuple[torch.Tensor, list[Given]]]


class _Ended(Exception):
    """The last layer has been reached."""


class _Changed(Exception):
    """A layer was given other hidden states than the one before it had returned."""


class Body:
    """The part of transformers' model between token ids and final hidden states.

    layers: in order. tables: the embeddings outside of the layers, by full name. names: all parameters and stored
    buffers outside of the layers, by full name.
    Raises ConvertError where no layers are found.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        full_names = {module: name for name, module in model.named_modules()}
        container = _layers_of(model)
        self.module = _owner(model, full_names[container])
        self.layers: list[nn.Module] = list(container)
        inside = f"{full_names[container]}."
        prefix = f"{full_names[self.module]}." if full_names[self.module] else ""
        self.tables = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and name.startswith(prefix) and not name.startswith(inside)
        }
        self.names = [prefix + name for name in self.module.state_dict() if not (prefix + name).startswith(inside)]
        self._local, self._wrapped = threading.local(), False
        self.refusal = partial(refused, model.config.model_type)

    @contextmanager
    def only_before(self) -> Iterator[Note]:
        """A function that runs what stands before the layers over tokens, int64 [n_samples, n_positions]: returns the
        first layer's input, and what every layer is given beside it."""

        def take_note(index: int, *args: Any, **kwargs: Any) -> Any:
            noted: _Noted = self._local.noted
            states, rest = (args[0], args[1:]) if args else (kwargs.pop(_STATES), ())
            if noted.states is None:
                noted.states = states
            elif states is not noted.states and (
                states.shape != noted.states.shape or not torch.equal(states, noted.states)
            ):
                raise _Changed
            noted.given.append(Given(rest, kwargs))
            if index == len(self.layers) - 1:
                raise _Ended
            return self._returned(noted.states)

        def note(tokens: torch.Tensor) -> tuple[torch.Tensor, list[Given]]:
            noted = self._local.noted = _Noted()
            with suppress(_Ended):
                self.module(input_ids=tokens, use_cache=False)
            if noted.states is None or len(noted.given) != len(self.layers):
                raise self.refusal("its body does not run them one after the other")
            return noted.states, noted.given

        with self._in_place_of_layers(take_note):
            yield note

    @contextmanager
    def only_after(self) -> Iterator[Callable[[torch.Tensor, Callable[[torch.Tensor], Any]], Any]]:
        """A function of hidden states after the last layer, [n_samples, n_positions, width] or as the model has them,
        and of one that runs the body over token ids, which are all zero: it returns what that returns, with these
        states in the place of what the layers make."""

        def insert(index: int, *args: Any, **kwargs: Any) -> Any:
            return self._returned(self._local.states)

        def run(states: torch.Tensor, forward: Callable[[torch.Tensor], Any]) -> Any:
            self._local.states = states
            try:
                return forward(torch.zeros(states.shape[-3:-1], dtype=torch.int64, device=self.device))
            finally:
                del self._local.states

        with self._in_place_of_layers(insert), self.without_tables():
            yield run

    @contextmanager
    def without_tables(self, seed: int | None = None) -> Iterator[None]:
        """Embeddings look up zeros, or with a seed random numbers, and need no weights."""

        def look_up(table: nn.Embedding, tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            shape = *tokens.shape, table.embedding_dim
            if seed is None:
                return torch.zeros(shape, dtype=self.dtype, device=self.device)
            random = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            return random.to(self.device, self.dtype)

        with ExitStack() as stack:
            for table in self.tables.values():
                stack.enter_context(instead(table, partial(look_up, table)))
            yield

    def arguments(self, n_positions: int) -> tuple[list[Given], list[tuple[str, ...]]]:
        """What every layer is given for samples of this length, and the names of those arguments that depend on the
        tokens. Everything outside of the layers but the tables is resident."""
        runs = [self._note_random(seed, n_positions) for seed in (0, 1)]
        dependent = [
            tuple(name for name, value in given.named().items() if self._differ(name, value, other.named()[name]))
            for given, other in zip(*runs, strict=True)
        ]
        return runs[0], dependent

    def _note_random(self, seed: int, n_positions: int) -> list[Given]:
        """What every layer is given where all tokens are the seed and embeddings look up random numbers. Finds out
        whether layers return their hidden states by themselves or in a tuple: the next one has to be given what the one
        before returned."""
        tokens = torch.full((1, n_positions), seed, dtype=torch.int64, device=self.device)
        for self._wrapped in (False, True):
            with self.without_tables(seed), self.only_before() as note, torch.no_grad():
                try:
                    return note(tokens)[1]
                except _Changed:
                    continue
                except ValueError as error:  # of unpacking
                    raise self.refusal(f"its body takes more from a layer than hidden states ({error})") from error
        raise self.refusal("its body changes the hidden states between them")

    def _returned(self, states: torch.Tensor) -> Any:
        """Hidden states as the layers return them."""
        return (states,) if self._wrapped else states

    def inputs(self, given: list[Given], dependent: list[tuple[str, ...]], states: torch.Tensor) -> dict[str, Any]:
        """The parts of the state before the first layer: hidden states, and the inputs of single layers."""
        parts = {HIDDEN: states}
        for index, names in enumerate(dependent):
            of_layer = given[index].named()
            parts |= {input_name(index, name): of_layer[name] for name in names}
        return parts

    def _differ(self, name: str, one: Any, other: Any) -> bool:
        """Whether two values of an argument differ. Raises ConvertError for what cannot go from layer to layer."""
        if isinstance(one, torch.Tensor):
            return not torch.equal(one, other)
        if isinstance(one, tuple | list):
            pairs = zip(one, other, strict=True)
        elif isinstance(one, dict):
            pairs = zip(one.values(), other.values(), strict=True)
        elif one is None or isinstance(one, bool | int | float | str) or name in CACHES or is_shared(one):
            return False
        else:
            raise self.refusal(f"they are given a {type(one).__name__} as {name!r}")
        if any(self._differ(name, *pair) for pair in pairs):
            raise self.refusal(f"{name!r} depends on the tokens in a way that is not known")
        return False

    @contextmanager
    def _in_place_of_layers(self, forward: Callable[..., Any]) -> Iterator[None]:
        """forward: given the layer's index first."""
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(instead(layer, partial(forward, index)))
            yield


def is_shared(value: Any) -> bool:
    """Whether an argument is what layers share keys and values by: a mapping that they change."""
    from transformers.cache_utils import KVSharingDict

    return isinstance(value, KVSharingDict)


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own shows again


def _layers_of(model: Any) -> nn.ModuleList:
    """The largest list of as many modules as the model has layers."""
    n_layers = model.config.num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise refused(model.config.model_type, f"no list of {n_layers} layers is found")
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))


def _owner(model: Any, name: str) -> Any:
    """The innermost of transformers' models that has the module of this name."""
    from transformers import PreTrainedModel

    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel):
            return module
    return model


def refused(model_type: str, why: str) -> ConvertError:
    """What is said of a model whose structure forbids to run it a layer at a time."""
    return ConvertError(
        f"the layers of {model_type!r} cannot be run one at a time: {why}",
        "calibration",
        "give an importance matrix with --imatrix FILE and --judge off, or convert to 8 bits and more",
    )
