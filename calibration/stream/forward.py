"""Layer streaming: take all samples through a model of any size with the weights of one decoder layer in memory.

For every layer in turn all samples go through the layer's own forward, from one file of hidden states to the other;
then the checkpoint is written and the layer's weights are freed. The next layer's weights load meanwhile.

On a CPU every worker thread takes whole micro-batches through the layer, each on one core: no core waits for another
inside of an operation, and the results do not depend on the number of threads. Of several GPUs alike each has the layer
and takes micro-batches in turn; what they have shown is merged in the order of the samples on the first one, so that
the results do not depend on the number of GPUs either.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from bitwright.calibration.control import Interrupted, PassControl
from bitwright.calibration.stream.anatomy.state import Layout
from bitwright.calibration.stream.build import others_alike
from bitwright.calibration.stream.checkpointing import NOT_STARTED, HiddenStates, StreamCheckpoint
from bitwright.calibration.stream.device.memory import MicroBatch, is_out_of_memory
from bitwright.calibration.stream.micro_batches import Excerpt, largest_micro_batch, spans_of_samples
from bitwright.calibration.stream.model import Arranged, LayerCall, LayerwiseModel, Weights
from bitwright.calibration.stream.observer import NoStatistic, Observer, ProductTap, locate_matrices
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.stream.weights import HEAD, ParameterReader
from bitwright.formats.errors import ConvertError


class LayerStream(LayerwiseModel):
    """One pass of a model over one set of tokens.

    tokens: int [n_samples, sequence_length]. control: its work directory is this pass's alone.
    observer: is shown every matrix product of the layers and, last, the inputs of the output head; one of caches (see
    key_values) the keys and values, too. settings: what the observer's statistics depend on beside the model and the
    tokens; a checkpoint of others is refused.
    keep: every layer's input, for a pass back; otherwise only the last one is kept.
    after: a finished stream that has kept them, over the same tokens, and the number of its layers whose weights are
    the same: these are not run again, and the observer does not see them.
    excerpt: what the tokens are of a text whose statistics are summed by groups, see Excerpt.
    """

    on_all_gpus = True

    def __init__(
        self,
        streamable: StreamableModel,
        tokens: np.ndarray,
        control: PassControl,
        *,
        observer: Observer | None = None,
        settings: Mapping[str, object] | None = None,
        keep: bool = False,
        after: "tuple[LayerStream, int] | None" = None,
        excerpt: Excerpt | None = None,
    ):
        super().__init__(streamable)
        self._streamable = streamable
        self.tokens, self.control, self.observer = tokens, control, observer or NoStatistic()
        self.n_samples, self.sequence_length = tokens.shape
        self.excerpt, self.first = excerpt, 0 if excerpt is None else excerpt.first
        self._after, self.batch = after, largest_micro_batch(self.device, self.sequence_length, self.observer)
        self._arranged: Arranged | None = None
        settings = dict(settings or {}) | ({} if after is None else {"layers taken over": after[1]})
        settings |= {} if excerpt is None else {"samples of the text": [excerpt.first, excerpt.n_text]}
        self._checkpoint = self.open_checkpoint(control.work_dir, self.observer, self.batch, settings, keep=keep)
        layouts = self._checkpoint.notes.get("layouts", {})
        self.layouts = {int(layers): Layout.from_json(of) for layers, of in layouts.items()}

    @property
    def arranged(self) -> Arranged:
        """What the model does with these samples."""
        if self._arranged is None:
            self._arranged = self.arrange(self.sequence_length)
        return self._arranged

    @cached_property
    def copies(self) -> list[LayerwiseModel]:
        """The model on other GPUs alike, on no more than have a micro-batch to do."""
        devices = others_alike(self.device) if self.on_all_gpus else []
        n_useful = len(self.micro_batches(self.batch.samples)) - 1
        return [LayerwiseModel(self._streamable, device) for device in devices[:n_useful]]

    @cached_property
    def arranged_copies(self) -> list[Arranged]:
        """What they do with these samples."""
        return [copy.arrange(self.sequence_length) for copy in self.copies]

    def run(self, stage: str = "calibrate") -> None:
        """Take all samples through all layers, from wherever the checkpoint stands.

        stage: what the progress calls it, whose unit is a token; one that is through half of the layers counts half.
        Raises Interrupted after the layer during which the control came to say so.
        """
        self._checkpoint.tell_damage(self.control.progress)
        if self._checkpoint.complete:
            return
        report = partial(self.report, stage, len(self.layers))
        with self.workers(1 + len(self.copies)) as pool, torch.no_grad():
            if self._checkpoint.layers_done == NOT_STARTED:
                if self._after is None:
                    self._embed(pool)
                else:
                    self.layouts |= self._after[0].layouts
                    self._commit(self._after[1])
            if self._checkpoint.layers_done < len(self.layers):
                self._through_layers(pool, report)
            self._observe_head()

    def hidden(self, layers_done: int) -> HiddenStates:
        """The hidden states after that many layers of a finished run: with `keep` of any, otherwise the last ones."""
        return self._checkpoint.hidden(layers_done)

    def hidden_states(self, start: int, stop: int) -> torch.Tensor:
        """Samples start to stop of a finished run after the last layer, before the final norm, on the device:
        [stop - start, sequence_length, width]."""
        return self.read_states(self.hidden(len(self.layers)), start, stop)

    def read_states(
        self, source: HiddenStates, start: int, stop: int, device: torch.device | None = None
    ) -> torch.Tensor:
        """Samples start to stop of a file, on the device or on their way there. device: None for this one's."""
        pinned = self.device.type == "cuda"
        return source.read(start, stop, pinned).to(device or self.device, non_blocking=pinned)

    def weights_after_layers(self, arranged: Arranged) -> dict[str, torch.Tensor]:
        """What is resident of the body's weights that are multiplied after the layers, by full name."""
        weights, before = self.model.state_dict(), arranged.before
        return {name: weights[name] for name in self.body.names if name not in before and not weights[name].is_meta}

    def discard_hidden_states(self) -> None:
        """Delete the large files of a finished run; what the observer collected stays."""
        self._checkpoint.discard_hidden_states()

    def open_checkpoint(
        self,
        directory: Path,
        observer: Observer,
        batch: MicroBatch,
        settings: Mapping[str, object],
        *,
        keep: bool = False,
    ) -> StreamCheckpoint:
        """The checkpoint of a pass over these samples, whose observer and micro-batch continue from there.

        settings: what its results depend on beside weights, tokens, device and dtype.
        """
        fingerprint = {
            "weights": self.identity,
            "dtype": str(self.dtype),  # before the configuration, which states it among all else
            "model configuration": hashlib.sha256(self.config.to_json_string(use_diff=False).encode()).hexdigest(),
            "tokens": hashlib.sha256(np.ascontiguousarray(self.tokens, "<i8").tobytes()).hexdigest(),
            "sequence length": self.sequence_length,
            "device": self.device.type,
            "micro-batch": batch.samples,
            "statistics": type(observer).__name__,
            **settings,
        }
        checkpoint = StreamCheckpoint(directory, fingerprint, self.sequence_length, self.dtype, keep=keep)
        observer.load_arrays(checkpoint.arrays)
        if "micro-batch" in checkpoint.notes:
            batch.continued(checkpoint.notes["micro-batch"])
        return checkpoint

    def for_all_samples(
        self,
        pool: ThreadPoolExecutor,
        micro_batch: Callable[[int, int], None],
        weights: Mapping[str, torch.Tensor],
        observer: Observer,
        batch: MicroBatch,
        ranges: Sequence[tuple[int, int]] | None = None,
        elsewhere: Sequence[Callable[[int, int], Observer]] = (),
    ) -> Iterator[int]:
        """Runs micro-batches, from sample start to stop, in the pool; merges what the products with these weights have
        shown in the order of the samples, and yields the samples done. Where a GPU's memory is full, the rest goes in
        smaller micro-batches; what of a larger one is written is written again. Raises ConvertError where one sample is
        too much.

        ranges: (first sample, the one after the last), one or more in order, where not all samples are meant; no
        micro-batch is of two of them. elsewhere: what runs them on other devices, which take turns with this one, and
        brings here what has been seen."""
        devices = cycle([self.observed(micro_batch, weights, observer), *elsewhere])
        most = self.threads * (1 + len(elsewhere))
        spans = deque(self.micro_batches(batch.samples, 0, ranges))
        # No more at once than the threads have to do: each holds what it has seen, as large as all statistics.
        running: deque[tuple[tuple[int, int], Future[Observer]]] = deque()
        try:
            while spans or running:
                while spans and len(running) <= most:
                    span = spans.popleft()
                    running.append((span, pool.submit(next(devices), *span)))
                (start, stop), future = running.popleft()
                if (error := _out_of_memory(future)) is not None:
                    _end(future for _, future in running)
                    running.clear()
                    batch.halve(self.device, error)
                    spans = deque(self.micro_batches(batch.samples, start, ranges))
                    continue
                with torch.inference_mode():  # what was made in it is changed in it alone
                    observer.merge(future.result())
                yield stop
        finally:
            for _, future in running:
                future.cancel()

    def observed(
        self,
        micro_batch: Callable[[int, int], None],
        weights: Mapping[str, torch.Tensor],
        observer: Observer,
        model: LayerwiseModel | None = None,
    ) -> Callable[[int, int], Observer]:
        """The micro-batch, which returns what its products with these weights have shown. model: a copy on another
        device that computes it, None for this one; what has been seen comes here."""
        owners, model = locate_matrices(weights), model or self

        def run(start: int, stop: int) -> Observer:
            seen = observer.fresh(self.first + start)
            with ProductTap(owners, seen), model.cache.shown_to(seen), model.computing(weights):
                micro_batch(start, stop)
            if model is not self:
                with torch.inference_mode():  # what was made in it is changed in it alone
                    seen.move_to(self.device)
            return seen

        return run

    def observed_elsewhere(
        self,
        index: int,
        of_copies: Sequence[Weights],
        observer: Observer,
        micro_batch: Callable[[LayerCall, torch.device], Callable[[int, int], None]],
    ) -> list[Callable[[int, int], Observer]]:
        """The same by every copy, whose weights of that layer are resident; micro_batch: by the layer on a device."""
        return [
            self.observed(micro_batch(arranged.calls[index], copy.device), own, observer, copy)
            for copy, arranged, own in zip(self.copies, self.arranged_copies, of_copies, strict=True)
        ]

    def fit(self, batch: MicroBatch, run: Callable[[int, int], Observer]) -> None:
        """Look once how much memory a sample takes, before anything else is loaded."""
        batch.fit(self.device, self.threads, self.layer_bytes(), lambda: run(0, 1))

    def micro_batches(
        self, batch: int, first: int = 0, ranges: Sequence[tuple[int, int]] | None = None
    ) -> list[tuple[int, int]]:
        """(first sample, the one after the last) of each, from the first sample on; ranges: as of for_all_samples."""
        if ranges is None:
            return spans_of_samples(self.n_samples, batch, self.excerpt, first)
        rest = ((max(start, first), last) for start, last in ranges)
        return [(start, min(start + batch, last)) for begin, last in rest for start in range(begin, last, batch)]

    def report(self, stage: str, n_steps: int, step: int, samples_done: int) -> None:
        """A token that is through half of the steps counts half."""
        n_tokens = self.n_samples * self.sequence_length
        done = round((step + samples_done / self.n_samples) / n_steps * n_tokens)
        self.control.progress(stage, done, n_tokens, "tokens")

    def _embed(self, pool: ThreadPoolExecutor) -> None:
        if self.tokens.max() >= self.config.vocab_size:
            raise ConvertError(
                f"the text has the token {self.tokens.max()}, the model knows {self.config.vocab_size} tokens",
                "tokenizer",
                "fetch the tokenizer and config.json again, from the same revision",
            )
        states = self._checkpoint.hidden(0)

        def micro_batch(start: int, stop: int) -> None:
            with torch.inference_mode():
                made, self.layouts[0] = first(self.token_tensor(start, stop))
                states.write(start, made)

        with self.first_states(self.arranged) as (weights, first):
            for _ in self.for_all_samples(pool, micro_batch, weights, self.observer, self.batch):
                pass
        self._commit(0)

    def token_tensor(self, start: int, stop: int) -> torch.Tensor:
        """Tokens of samples start to stop, int64 on the device."""
        return torch.from_numpy(self.tokens[start:stop].astype(np.int64)).to(self.device)

    def _through_layers(self, pool: ThreadPoolExecutor, report: Callable[[int, int], None]) -> None:
        calls = self.arranged.calls

        def first(index: int, weights: Mapping[str, torch.Tensor]) -> None:
            self.fit(
                self.batch, self.observed(partial(self.forward, calls[index], self.device), weights, self.observer)
            )

        remaining = range(self._checkpoint.layers_done, len(self.layers))
        with closing(self.layers_in_turn(remaining, first, self.copies)) as turns:
            for index, weights in turns:
                for samples_done in self.through_layer(pool, calls[index], *weights):
                    report(index, samples_done)
                self._commit(index + 1)
                if self.control.should_stop():
                    raise Interrupted(f"stopped after layer {index + 1} of {len(self.layers)}")

    def through_layer(
        self, pool: ThreadPoolExecutor, call: LayerCall, weights: Weights, *of_copies: Weights
    ) -> Iterator[int]:
        """Takes all samples through a layer, whose weights are resident, in the copies, too; yields the samples
        done."""
        forward = partial(partial, self.forward)
        elsewhere = self.observed_elsewhere(call.index, of_copies, self.observer, forward)
        here = forward(call, self.device)
        yield from self.for_all_samples(pool, here, weights, self.observer, self.batch, elsewhere=elsewhere)

    @torch.inference_mode()
    def forward(self, call: LayerCall, device: torch.device, start: int, stop: int) -> None:
        """Takes samples start to stop through a layer, which is on this device."""
        inputs = self.layer_inputs(call.index, device, start, stop)
        states, self.layouts[call.index + 1] = call(inputs, self.layouts[call.index])
        self.hidden(call.index + 1).write(start, states)

    def layer_inputs(self, index: int, device: torch.device, start: int, stop: int) -> torch.Tensor:
        """What samples start to stop are before the layer, on the device or on their way there: [stop - start,
        sequence_length, width]."""
        if self._after is not None and self._after[1] == index:
            return self.read_states(self._after[0].hidden(index), start, stop, device)
        return self.read_states(self.hidden(index), start, stop, device)

    def _observe_head(self) -> None:
        """The head's inputs are its importance; its products, the vocabulary wide, need not be computed for that."""
        arranged = self.arranged
        with self.head_inputs() as head_inputs:
            owners = locate_matrices(self.weights_after_layers(arranged))
            for start, stop in self.micro_batches(self.batch.samples):
                seen = self.observer.fresh(self.first + start)
                with torch.inference_mode():
                    with ProductTap(owners, seen):
                        inputs = head_inputs(self.hidden_states(start, stop))
                    if self.output is not None:
                        seen.observe(HEAD, 0, 1, inputs, None)
                    self.observer.merge(seen)
        self._commit(len(self.layers), complete=True)

    def _commit(self, layers_done: int, complete: bool = False) -> None:
        layouts = {str(layers): layout.to_json() for layers, layout in self.layouts.items()}
        self._checkpoint.notes = {"layouts": layouts, "micro-batch": self.batch.to_json()}
        self._checkpoint.commit(layers_done, self.observer.to_arrays(), complete)


def _out_of_memory(future: Future[Observer]) -> BaseException | None:
    """What a micro-batch ended with, where that is a GPU's full memory."""
    error = future.exception()
    return error if error is not None and is_out_of_memory(error) else None


def _end(futures: Iterable[Future[Observer]]) -> None:
    """Let nothing of them run, or hold memory, any more."""
    wait([future for future in futures if not future.cancel()])


def stream_past(
    observer: Observer,
    streamable: StreamableModel,
    tokens: np.ndarray,
    control: PassControl,
    *,
    stage: str = "calibrate",
    settings: Mapping[str, object] | None = None,
    excerpt: Excerpt | None = None,
) -> ParameterReader:
    """Run the model over the tokens, int [n_samples, sequence_length], for the observer alone, which then has seen
    everything; settings, excerpt: as of LayerStream. The checkpoint stays, without its hidden states: with it a
    second call returns at once. Returns what finds the stored tensors of the parameters that the observer names."""
    stream = LayerStream(streamable, tokens, control, observer=observer, settings=settings, excerpt=excerpt)
    stream.run(stage)
    stream.discard_hidden_states()
    return stream.parameters
