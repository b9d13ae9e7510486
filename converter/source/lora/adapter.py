"""A LoRA adapter as peft writes it: adapter_config.json and adapter_model.safetensors, over the tensors of its base.

An adapted matrix is W + scale * B A, scale = alpha / r, or alpha / sqrt(r) (rslora); DoRA then gives its rows the
lengths that it has learned. Whole modules that were trained (modules_to_save), embeddings and biases take the place of
the base model's. The head of a tied model stays what it was where the embedding alone was trained, and the other way
round, as in training.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitwright.converter.architectures.architecture import known_architecture
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.lora.merged_tensor import LowRank, MergedTensor
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import read_json
from bitwright.formats.files.safetensors import read_header
from bitwright.formats.files.stored_tensor import DTYPE_BYTES, SourceTensor, StoredTensor
from bitwright.profiles.vocabulary import Role

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
# Ends of the names of an adapted module's tensors -> what they are.
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_PART = re.compile(r"\.(lora_[A-Za-z_]+(?:\.weight)?)$")
# Options that make of the tensors something else than what is merged here, unless they are empty.
_UNKNOWN_OPTIONS = (
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "lora_bias",
)
# Ways to begin that change the base model, too, so that an adapter alone does not say what was trained.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


def is_adapter(directory: Path) -> bool:
    """Whether the directory holds an adapter, and no model."""
    return (directory / CONFIG_NAME).is_file() and not (directory / "config.json").is_file()


@dataclass(frozen=True)
class Adapter:
    """directory: of its files; config: adapter_config.json; tensors: by their names in the file."""

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    @property
    def base_name(self) -> str | None:
        """The base model's, as the adapter states it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def merged(self, base: Checkpoint, model_id: str) -> Checkpoint:
        """The base model with the adapter in it. Raises ConvertError for an adapter that is not of this model."""
        if base.metadata is not None:
            raise ConvertError(
                "adapters are merged into a Hugging Face checkpoint, and the base is a GGUF",
                str(base.location),
                "give its directory or Hub id with --base",
            )
        merger = _Merger(self, base)
        tensors, n_merged, n_replaced = merger.tensors(), len(merger.low_ranks), len(merger.replaced)
        replaced = f", and {n_replaced} tensors take the place of its own" if n_replaced else ""
        note = f"the adapter {model_id} is merged into {base.model_id}: {n_merged} matrices are adapted{replaced}"
        fetch = None if base.fetch_weights is None else lambda: self.merged(base.with_weights(), model_id)
        return replace(
            base,
            model_id=model_id,
            tensors=tensors,
            notes=(*base.notes, note),
            beside=(self.directory / CONFIG_NAME,),
            fetch_weights=fetch,
        )

    def low_ranks(self, base: Checkpoint) -> dict[str, LowRank]:
        """By the names of the base model's tensors what is added to each. Raises ConvertError for an adapter that
        replaces tensors, too."""
        merger = _Merger(self, base)
        merger.tensors()
        if merger.replaced:
            raise self.unusable(
                f"it replaces {merger.replaced[0]!r}, which nothing can add to a model",
                "merge it: the same command without --lora-gguf",
            )
        return merger.low_ranks

    def scale(self, module: str, rank: int) -> float:
        """By what B A of this module is multiplied."""
        alpha = self.config.get("lora_alpha")
        patterns = self.config.get("alpha_pattern") or {}
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
            raise self.unusable(f"its lora_alpha is {alpha!r}, which is no number")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def unusable(self, what: str, remedy: str = "fetch it again, or ask its author for a merged model") -> ConvertError:
        return ConvertError(f"the adapter cannot be merged: {what}", str(self.directory), remedy)


def open_adapter(directory: Path) -> Adapter:
    """Raises ConvertError for an adapter of another kind than LoRA, and for one whose weights are not safetensors."""
    config = read_json(directory / CONFIG_NAME)
    weights = directory / WEIGHTS_NAME
    if not weights.is_file():
        raise ConvertError(
            f"the adapter has no {WEIGHTS_NAME}; pickles, which can run any code when they are loaded, are not read",
            str(directory),
            "fetch it again, or save it again where it was trained: model.save_pretrained('adapter')",
        )
    tensors, _ = read_header(weights)
    adapter = Adapter(directory, config, tensors)
    if config.get("peft_type") != "LORA":
        raise adapter.unusable(
            f"it is of the kind {config.get('peft_type')!r}, and LoRA is merged here",
            "merge it where it was trained: model.merge_and_unload().save_pretrained('merged')",
        )
    for option in _UNKNOWN_OPTIONS:
        if config.get(option):
            raise adapter.unusable(f"it was trained with {option}, which is not known here")
    if isinstance(begun := config.get("init_lora_weights"), str) and _CHANGES_BASE.match(begun):
        raise adapter.unusable(
            f"it began as {begun}, which changes the base model, too",
            "save it as an adapter of the plain base model: peft's path_initial_model_for_weight_conversion",
        )
    if wrong := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPE_BYTES]:
        raise adapter.unusable(f"{wrong[0]!r} is stored as {tensors[wrong[0]].dtype}")
    return adapter


class _Merger:
    """Finds the places of an adapter's tensors in its base model."""

    def __init__(self, adapter: Adapter, base: Checkpoint):
        self.adapter, self.base = adapter, base
        architecture = known_architecture(base.config)
        canonical: Callable[[str], str | None] = (
            (lambda name: name) if architecture is None else architecture.canonical_name
        )
        self.canonical = canonical
        self.stored = {canonical(name) or name: name for name in base.tensors} | {name: name for name in base.tensors}
        self.head = self.embedding = None
        if architecture is not None:
            self.head, self.embedding = architecture.named(Role.OUTPUT), architecture.named(Role.EMBEDDING)
        self.changed: dict[str, SourceTensor] = {}
        self.low_ranks: dict[str, LowRank] = {}
        self.replaced: list[str] = []

    def tensors(self) -> dict[str, SourceTensor]:
        low_rank: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self.adapter.tensors.items():
            module = name.removeprefix(_PREFIX)
            if (match := _PART.search(module)) is not None and match[1] in _PARTS:
                low_rank.setdefault(module[: match.start()], {})[_PARTS[match[1]]] = tensor
            elif "lora_" in module:
                raise self.adapter.unusable(f"{name!r} is of no kind that is known here")
            else:
                self._replace(module, tensor)
        for module, parts in low_rank.items():
            self._adapt(module, parts)
        self._keep_apart()
        return {**self.base.tensors, **self.changed}

    def _replace(self, name: str, tensor: StoredTensor) -> None:
        """A tensor that takes the place of the base model's."""
        name = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".").replace(".default.", ".")
        place, base = self._place(name)
        if tensor.shape != base.shape:
            raise self.adapter.unusable(
                f"it has {name!r} of the shape {list(tensor.shape)}, and the base model {list(base.shape)}",
                "give the base model that it was trained from with --base; one with another vocabulary has to be saved"
                " with that vocabulary first",
            )
        self.changed[place] = tensor
        self.replaced.append(place)

    def _adapt(self, module: str, parts: Mapping[str, StoredTensor]) -> None:
        embedding = "embedding_a" in parts or "embedding_b" in parts
        a, b = (parts.get(f"embedding_{part}" if embedding else part) for part in ("a", "b"))
        place, base = self._place(f"{module.removesuffix('.base_layer')}.weight")
        sideways, magnitude = embedding or bool(self.adapter.config.get("fan_in_fan_out")), parts.get("magnitude")
        if a is None or b is None:
            raise self.adapter.unusable(f"{module!r} has one half of its two matrices")
        rank = a.shape[0] if len(a.shape) == 2 else 0
        shape = (a.shape[-1], b.shape[0]) if sideways else (b.shape[0], a.shape[-1])
        if rank == 0 or b.shape[1:] != (rank,) or shape != base.shape:
            raise self.adapter.unusable(
                f"its matrices for {module!r} are {list(b.shape)} and {list(a.shape)}, and the base model's is"
                f" {list(base.shape)}",
                "give the base model that it was trained from with --base",
            )
        if magnitude is not None and (sideways or math.prod(magnitude.shape) != b.shape[0]):
            raise self.adapter.unusable(f"the lengths of the rows of {module!r} (DoRA) do not fit")
        if magnitude is None and self.adapter.config.get("use_dora"):
            raise self.adapter.unusable(f"{module!r} lacks the lengths of its rows (DoRA)")
        low_rank = LowRank(a, b, self.adapter.scale(module, rank), sideways, magnitude)
        self.low_ranks[place] = low_rank
        self.changed[place] = MergedTensor.of(self.changed.get(place, base), low_rank)

    def _place(self, name: str) -> tuple[str, SourceTensor]:
        """The stored name of a tensor of transformers' model, and the tensor; of a tied head the embedding."""
        stored = self.stored.get(name) or self.stored.get(self.canonical(name) or name)
        if stored is not None:
            return stored, self.base.tensors[stored]
        if self.head is not None and self.canonical(name) == self.head and self.embedding in self.stored:
            return self.head, self.base.tensors[self.stored[self.embedding]]
        raise self.adapter.unusable(
            f"it adapts {name!r}, which the base model {self.base.model_id} does not have",
            "give the base model that it was trained from with --base",
        )

    def _keep_apart(self) -> None:
        """A tied head does not take over what was trained of the embedding alone, unless the adapter says so."""
        if self.embedding is None or self.head is None or self.head in self.stored or self.head in self.changed:
            return
        embedding = self.stored.get(self.embedding, "")
        saved = self.adapter.config.get("modules_to_save") or ()
        trained = isinstance(self.changed.get(embedding), MergedTensor) or any(
            f"{embedding.removesuffix('.weight')}".endswith(str(module)) for module in saved
        )
        if embedding in self.changed and trained and not self.adapter.config.get("ensure_weight_tying"):
            self.changed[self.head] = self.base.tensors[embedding]
