"""Layer streaming: run a model of any size over all samples with the weights of one decoder layer in memory.

transformers builds the model without weights and runs its own forward code once, on one sample of zeros. Each decoder
layer's forward is replaced by ours, which thereby receives the masks, rotary embeddings and flags that the model makes
for that layer. They depend on positions alone, which are the same for all samples, so they serve every micro-batch:
ours loads the layer's weights, takes all samples through the layer's own forward, from one file of hidden states to
the other, writes the checkpoint and frees the weights. The next layer's weights load meanwhile.

On a CPU every worker thread takes whole micro-batches through the layer, each on one core: no core waits for another
inside of an operation, and the results do not depend on the number of threads.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from calibration.checkpointing import NOT_STARTED, StreamCheckpoint
from calibration.control import Interrupted, Progress, ShouldStop, never, silent
from calibration.model import build_without_weights, choose_device, load_config
from calibration.observer import NoStatistic, Observer, Owners, ProductTap, locate_matrices
from calibration.weights import HEAD, ParameterReader, WeightSource
from formats.errors import ConvertError

# Tokens of a micro-batch: on a CPU few, so that a layer's activations stay in the cache; on a GPU many.
_MICRO_BATCH_TOKENS = {"cpu": 512, "cuda": 8192, "mps": 2048}

Weights = dict[str, torch.Tensor]


class LayerStream:
    """One pass of a model over one set of tokens.

    source: the weights. config_dir: a directory with config.json.
    tokens: int [n_samples, sequence_length]. work_dir: the checkpoint's place, for this pass alone.
    observer: is shown every matrix product of the layers and, last, the inputs of the output head.
    identity: what tells the weights from others of the same shapes; a checkpoint of others is refused.
    device: "auto", "cpu", "cuda" or "mps"; float32, on cuda bfloat16. threads: CPU threads, None for one a core.
    """

    def __init__(
        self,
        source: WeightSource,
        config_dir: Path,
        tokens: np.ndarray,
        work_dir: Path,
        *,
        observer: Observer | None = None,
        identity: str = "",
        device: str = "auto",
        threads: int | None = None,
    ):
        self.device = choose_device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.threads = (threads or torch.get_num_threads()) if self.device.type == "cpu" else 1
        self.config = load_config(config_dir)
        self.model = build_without_weights(self.config, self.dtype, self.device)
        self.layers: list[nn.Module] = list(self.model.base_model.layers)
        self.parameters = ParameterReader(source, tied=self.config.tie_word_embeddings)
        self.tokens, self.observer, self.identity = tokens, observer or NoStatistic(), identity
        self.n_samples, self.sequence_length = tokens.shape
        self._batch = max(1, _MICRO_BATCH_TOKENS[self.device.type] // self.sequence_length)
        self._names = {module: name for name, module in self.model.named_modules()}
        sample_shape = (self.sequence_length, self.config.hidden_size)
        self._checkpoint = StreamCheckpoint(work_dir, self._fingerprint(), sample_shape, self.dtype)
        self.observer.load_arrays(self._checkpoint.arrays)

    def run(self, progress: Progress = silent, should_stop: ShouldStop = never, *, stage: str = "calibrate") -> None:
        """Take all samples through all layers, from wherever the checkpoint stands.

        progress: in tokens; one that is through half of the layers counts half. Raises Interrupted after the layer
        during which should_stop came to say so.
        """
        if self._checkpoint.complete:
            return
        self._progress, self._should_stop = partial(progress, stage), should_stop
        with self.workers() as self._pool, ThreadPoolExecutor(1) as self._reader, torch.inference_mode():
            if self._checkpoint.layers_done == NOT_STARTED:
                self._embed()
            if self._checkpoint.layers_done < len(self.layers):
                self._through_layers()
            self._observe_head()

    def hidden_states(self, start: int, stop: int) -> torch.Tensor:
        """Of a finished run samples start to stop after the last layer, before the final norm, on the device:
        [stop - start, sequence_length, width]."""
        return self._checkpoint.hidden(len(self.layers)).read(start, stop).to(self.device)

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """With final norm and output head resident, the function from hidden states [n, width] to logits
        [n, vocabulary]: the model's own forward, in which the norm alone stands for the body."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        def normed(*, inputs_embeds: torch.Tensor, **_) -> MoeModelOutputWithPast:
            return MoeModelOutputWithPast(last_hidden_state=self.final_norm(inputs_embeds))

        self.model.base_model.forward = normed
        try:
            with self.resident(self.final_norm), self.resident(self.model.get_output_embeddings()):
                yield lambda states: self.model(inputs_embeds=states[None], use_cache=False).logits[0]
        finally:
            del self.model.base_model.forward

    def discard_hidden_states(self) -> None:
        """Delete the large files of a finished run; what the observer collected stays."""
        self._checkpoint.discard_hidden_states()

    @property
    def final_norm(self) -> nn.Module:
        return self.model.base_model.norm

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

    def _embed(self) -> None:
        embedding, states = self.model.get_input_embeddings(), self._checkpoint.hidden(0)
        if self.tokens.max() >= self.config.vocab_size:
            raise ConvertError(
                f"the text has the token {self.tokens.max()}, the model knows {self.config.vocab_size} tokens",
                "tokenizer",
                "fetch the tokenizer and config.json again, from the same revision",
            )
        with self.resident(embedding):
            for start, stop in self._micro_batches():
                tokens = torch.from_numpy(self.tokens[start:stop].astype(np.int64))
                states.write(start, embedding(tokens.to(self.device)))
        self._checkpoint.commit(0, {})

    def _through_layers(self) -> None:
        """One forward of the model's body, on a sample whose values nobody uses."""
        sample = torch.zeros(1, self.sequence_length, self.config.hidden_size, dtype=self.dtype, device=self.device)
        self._next = self._reader.submit(self.read, self.layers[self._checkpoint.layers_done])
        for i, layer in enumerate(self.layers):
            layer.forward = partial(self._layer, i, layer.forward)
        try:
            with self.resident(self.final_norm):
                self.model.base_model(inputs_embeds=sample, use_cache=False)
        finally:
            self._next.cancel()
            for layer in self.layers:
                del layer.forward  # the class's own shows again

    def _layer(self, index: int, forward: Callable[..., torch.Tensor], sample: torch.Tensor, *args, **kwargs):
        """Stands in for a layer's forward: all samples through the layer's own, and a checkpoint."""
        if index < self._checkpoint.layers_done:
            return sample
        weights = self._next.result()
        if index + 1 < len(self.layers):
            self._next = self._reader.submit(self.read, self.layers[index + 1])
        source, target = self._checkpoint.hidden(index), self._checkpoint.hidden(index + 1)

        def micro_batch(start: int, stop: int) -> None:
            states = source.read(start, stop).to(self.device)
            target.write(start, forward(states, *args, **kwargs))

        with self.resident(self.layers[index], weights) as parameters:
            self._for_all_samples(micro_batch, locate_matrices(parameters), index)
        self._commit(index + 1)
        if self._should_stop():
            raise Interrupted(f"stopped after layer {index + 1} of {len(self.layers)}")
        return sample

    def _observe_head(self) -> None:
        """The head's inputs are its importance; its products, the vocabulary wide, need not be computed for that."""
        with self.resident(self.final_norm):
            for start, stop in self._micro_batches():
                seen = self.observer.fresh()
                seen.observe(HEAD, 0, 1, self.final_norm(self.hidden_states(start, stop)), None)
                self.observer.merge(seen)
        self._commit(len(self.layers), complete=True)

    def _for_all_samples(self, micro_batch: Callable[[int, int], None], owners: Owners, index: int) -> None:
        """Runs the micro-batches in the pool, merges what each has shown in their order, and reports progress."""

        def observed(span: tuple[int, int]) -> tuple[int, Observer]:
            seen = self.observer.fresh()
            with torch.inference_mode(), ProductTap(owners, seen):
                micro_batch(*span)
            return span[1], seen

        n_tokens = self.n_samples * self.sequence_length
        for samples_done, seen in self._pool.map(observed, self._micro_batches()):
            self.observer.merge(seen)
            share = (index + samples_done / self.n_samples) / len(self.layers)
            self._progress(round(share * n_tokens), n_tokens, "tokens")

    def _commit(self, layers_done: int, complete: bool = False) -> None:
        self._checkpoint.commit(layers_done, self.observer.to_arrays(), complete)

    def _micro_batches(self) -> list[tuple[int, int]]:
        starts = range(0, self.n_samples, self._batch)
        return [(start, min(start + self._batch, self.n_samples)) for start in starts]

    def _fingerprint(self) -> dict[str, object]:
        return {
            "weights": self.identity,
            "model configuration": hashlib.sha256(self.config.to_json_string(use_diff=False).encode()).hexdigest(),
            "tokens": hashlib.sha256(np.ascontiguousarray(self.tokens, "<i8").tobytes()).hexdigest(),
            "sequence length": self.sequence_length,
            "device": self.device.type,
            "micro-batch": self._batch,
            "statistics": type(self.observer).__name__,
        }
