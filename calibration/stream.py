"""Layer streaming: take all samples through a model of any size with the weights of one decoder layer in memory.

For every layer in turn all samples go through the layer's own forward, from one file of hidden states to the other;
then the checkpoint is written and the layer's weights are freed. The next layer's weights load meanwhile.

On a CPU every worker thread takes whole micro-batches through the layer, each on one core: no core waits for another
inside of an operation, and the results do not depend on the number of threads.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch

from calibration.arithmetic import Arithmetic
from calibration.checkpointing import NOT_STARTED, HiddenStates, StreamCheckpoint
from calibration.choices import Dtype
from calibration.control import Interrupted, Progress, ShouldStop, never, silent
from calibration.micro_batches import fitting_samples, most_samples
from calibration.observer import NoStatistic, Observer, ProductTap, locate_matrices
from calibration.streamed_model import LayerCall, StreamedModel
from calibration.weights import HEAD, WeightSource
from formats.errors import ConvertError


class LayerStream(StreamedModel):
    """One pass of a model over one set of tokens.

    source: the weights. config_dir: a directory with config.json.
    tokens: int [n_samples, sequence_length]. work_dir: the checkpoint's place, for this pass alone.
    observer: is shown every matrix product of the layers and, last, the inputs of the output head; one of caches (see
    key_values) the keys and values, too.
    identity: what tells the weights from others of the same shapes; a checkpoint of others is refused.
    device, dtype, threads, arithmetic: see StreamedModel. keep: every layer's input, for a pass back; otherwise only
    the last one is kept. before_commit: called after every layer and at the end, before what is done counts as done.
    after: a finished stream that has kept them, over the same tokens, and the number of its layers whose weights are
    the same: these are not run again, and the observer does not see them.
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
        dtype: Dtype = "auto",
        threads: int | None = None,
        keep: bool = False,
        before_commit: "Callable[[LayerStream], None] | None" = None,
        after: "tuple[LayerStream, int] | None" = None,
        arithmetic: Arithmetic | None = None,
    ):
        super().__init__(source, config_dir, device=device, dtype=dtype, threads=threads, arithmetic=arithmetic)
        self._before_commit, self._after = before_commit, after
        self.tokens, self.observer, self.identity = tokens, observer or NoStatistic(), identity
        self.n_samples, self.sequence_length = tokens.shape
        self._batch = most_samples(self.device, self.sequence_length)
        settings = {} if after is None else {"layers taken over": after[1]}
        self._checkpoint = self.open_checkpoint(work_dir, self.observer, settings, keep=keep)

    def run(self, progress: Progress = silent, should_stop: ShouldStop = never, *, stage: str = "calibrate") -> None:
        """Take all samples through all layers, from wherever the checkpoint stands.

        progress: in tokens; one that is through half of the layers counts half. Raises Interrupted after the layer
        during which should_stop came to say so.
        """
        self._checkpoint.tell_damage(progress)
        if self._checkpoint.complete:
            return
        report = partial(self.report, progress, stage, len(self.layers))
        with self.workers() as pool, torch.no_grad():
            if self._checkpoint.layers_done == NOT_STARTED:
                if self._after is None:
                    self._embed()
                else:
                    self._checkpoint.commit(self._after[1], {})
            if self._checkpoint.layers_done < len(self.layers):
                self._through_layers(pool, report, should_stop)
            self._observe_head()

    def hidden(self, layers_done: int) -> HiddenStates:
        """Of a finished run the hidden states after that many layers: with `keep` any, otherwise the last ones."""
        return self._checkpoint.hidden(layers_done)

    def hidden_states(self, start: int, stop: int) -> torch.Tensor:
        """Of a finished run samples start to stop after the last layer, before the final norm, on the device:
        [stop - start, sequence_length, width]."""
        return self.hidden(len(self.layers)).read(start, stop).to(self.device)

    def discard_hidden_states(self) -> None:
        """Delete the large files of a finished run; what the observer collected stays."""
        self._checkpoint.discard_hidden_states()

    def open_checkpoint(
        self, directory: Path, observer: Observer, settings: Mapping[str, object], *, keep: bool = False
    ) -> StreamCheckpoint:
        """The checkpoint of a pass over these samples, whose observer continues from there.

        settings: what its results depend on beside weights, tokens, device and dtype.
        """
        fingerprint = {
            "weights": self.identity,
            "dtype": str(self.dtype),  # before the configuration, which states it among all else
            "model configuration": hashlib.sha256(self.config.to_json_string(use_diff=False).encode()).hexdigest(),
            "tokens": hashlib.sha256(np.ascontiguousarray(self.tokens, "<i8").tobytes()).hexdigest(),
            "sequence length": self.sequence_length,
            "device": self.device.type,
            "micro-batch": self._batch,
            "statistics": type(observer).__name__,
            **settings,
        }
        sample_shape = (self.sequence_length, self.config.hidden_size)
        checkpoint = StreamCheckpoint(directory, fingerprint, sample_shape, self.dtype, keep=keep)
        observer.load_arrays(checkpoint.arrays)
        return checkpoint

    def for_all_samples(
        self,
        pool: ThreadPoolExecutor,
        micro_batch: Callable[[int, int], None],
        weights: Mapping[str, torch.Tensor],
        observer: Observer,
        batch: int,
    ) -> Iterator[int]:
        """Runs micro-batches of `batch` samples or fewer, from sample start to stop, in the pool; merges what the
        products with these weights have shown in the order of the samples, and yields the samples done."""
        owners = locate_matrices(weights)

        def observed(span: tuple[int, int]) -> tuple[int, Observer]:
            seen = observer.fresh()
            with ProductTap(owners, seen), self.cache.shown_to(seen), self.computing(weights):
                micro_batch(*span)
            return span[1], seen

        batch = fitting_samples(self.device, batch, lambda: observed((0, 1)))
        for samples_done, seen in pool.map(observed, self.micro_batches(batch)):
            observer.merge(seen)
            yield samples_done

    def micro_batches(self, batch: int) -> list[tuple[int, int]]:
        """(first sample, the one after the last) of each."""
        return [(start, min(start + batch, self.n_samples)) for start in range(0, self.n_samples, batch)]

    def report(self, progress: Progress, stage: str, n_steps: int, step: int, samples_done: int) -> None:
        """A token that is through half of the steps counts half."""
        n_tokens = self.n_samples * self.sequence_length
        progress(stage, round((step + samples_done / self.n_samples) / n_steps * n_tokens), n_tokens, "tokens")

    def _embed(self) -> None:
        states = self._checkpoint.hidden(0)
        if self.tokens.max() >= self.config.vocab_size:
            raise ConvertError(
                f"the text has the token {self.tokens.max()}, the model knows {self.config.vocab_size} tokens",
                "tokenizer",
                "fetch the tokenizer and config.json again, from the same revision",
            )
        with self.resident(self.embedding):
            for start, stop in self.micro_batches(self._batch):
                states.write(start, self.embedding(self.token_tensor(start, stop)))
        self._checkpoint.commit(0, {})

    def token_tensor(self, start: int, stop: int) -> torch.Tensor:
        """Tokens of samples start to stop, int64 on the device."""
        return torch.from_numpy(self.tokens[start:stop].astype(np.int64)).to(self.device)

    def _through_layers(
        self, pool: ThreadPoolExecutor, report: Callable[[int, int], None], should_stop: ShouldStop
    ) -> None:
        calls = self.layer_calls(self.sequence_length)
        with closing(self.layers_in_turn(range(self._checkpoint.layers_done, len(self.layers)))) as turns:
            for index, weights in turns:
                inputs = self._checkpoint.hidden(index)
                if self._after is not None and self._after[1] == index:
                    inputs = self._after[0].hidden(index)
                micro_batch = partial(self._forward, calls[index], inputs, self._checkpoint.hidden(index + 1))
                for samples_done in self.for_all_samples(pool, micro_batch, weights, self.observer, self._batch):
                    report(index, samples_done)
                self._commit(index + 1)
                if should_stop():
                    raise Interrupted(f"stopped after layer {index + 1} of {len(self.layers)}")

    @torch.inference_mode()
    def _forward(self, call: LayerCall, source: HiddenStates, target: HiddenStates, start: int, stop: int) -> None:
        target.write(start, call(source.read(start, stop).to(self.device)))

    def _observe_head(self) -> None:
        """The head's inputs are its importance; its products, the vocabulary wide, need not be computed for that."""
        with self.resident(self.final_norm):
            for start, stop in self.micro_batches(self._batch):
                seen = self.observer.fresh()
                seen.observe(HEAD, 0, 1, self.final_norm(self.hidden_states(start, stop)), None)
                self.observer.merge(seen)
        self._commit(len(self.layers), complete=True)

    def _commit(self, layers_done: int, complete: bool = False) -> None:
        if self._before_commit is not None:
            self._before_commit(self)
        self._checkpoint.commit(layers_done, self.observer.to_arrays(), complete)
