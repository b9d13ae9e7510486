"""The layer stream run backwards: the exact gradients of the whole model's loss, at the memory of one layer.

A forward pass has kept the input of every layer. From the head down one layer is resident at a time: its forward is
computed again from that input, now with a graph, the gradient that the layer above has left is propagated through it,
and the gradient by its input is left for the layer below, in one of two files that take turns.

The loss is the sum over all positions of the cross-entropy with one label each. Labels drawn from the model's own
predictions make the expected square of its gradient the Fisher matrix, which is the curvature of the KL divergence;
they depend on the seed and the sample alone.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from calibration.checkpointing import NOT_STARTED
from calibration.control import Interrupted, Progress, ShouldStop, never, silent
from calibration.labels import Labels, draw
from calibration.micro_batches import most_samples
from calibration.observer import Observer
from calibration.stream import LayerStream
from calibration.streamed_model import LayerCall
from calibration.weights import EMBEDDING, HEAD


class GradientObserver(Observer, Protocol):
    """An observer of the pass back: it is shown products whose outputs have a gradient to come, for which it may
    register a hook, and at the end the embedding."""

    def observe_lookup(self, parameter: str, n_rows: int, tokens: torch.Tensor, gradients: torch.Tensor) -> None:
        """tokens: int64 [n_samples, sequence_length], the rows that were looked up in a parameter of n_rows;
        gradients: [n_samples, sequence_length, width], by the rows as they were looked up."""

    def fresh(self) -> Self: ...


class GradientStream:
    """The pass back of a finished forward pass that has kept the input of every layer.

    work_dir: the checkpoint's place, for this pass alone. observer: is shown the head's products, those of the layers
    from the last to the first, and the embedding's lookups.
    labels: "sampled" from the model's predictions, or the next token of the "text", which the last position lacks.
    """

    def __init__(
        self, forward: LayerStream, work_dir: Path, observer: GradientObserver, *, labels: Labels, seed: int = 0
    ):
        self.forward, self.observer, self.labels, self.seed = forward, observer, labels, seed
        self.n_layers = len(forward.layers)
        # On a CPU a sequence by itself is as fast, and an observer can tell it from others in every product.
        self._batch = 1 if forward.device.type == "cpu" else most_samples(forward.device, forward.sequence_length)
        settings = {"labels": labels} | ({"seed": seed} if labels == "sampled" else {})
        self._checkpoint = forward.open_checkpoint(work_dir, observer, settings)

    @property
    def complete(self) -> bool:
        return self._checkpoint.complete

    def run(self, progress: Progress = silent, should_stop: ShouldStop = never, *, stage: str = "gradients") -> None:
        """Take the gradient of all samples from the head to the embedding, from wherever the checkpoint stands.

        Raises Interrupted after the layer during which should_stop came to say so, and ConvertError for gradients that
        are not finite.
        """
        self._checkpoint.tell_damage(progress)
        if not self.complete:
            self._run(progress, should_stop, stage)
        self._checkpoint.discard_hidden_states()

    def _run(self, progress: Progress, should_stop: ShouldStop, stage: str) -> None:
        report = partial(self.forward.report, progress, stage, self.n_layers + 2)
        with self.forward.workers() as pool:
            if self._checkpoint.layers_done == NOT_STARTED:
                self._through_head(pool, partial(report, 0))
                self._commit(0)
                if should_stop():
                    raise Interrupted("stopped after the output head")
            if self._checkpoint.layers_done < self.n_layers:
                self._through_layers(pool, report, should_stop)
            self._through_embedding(partial(report, self.n_layers + 1))
            self._commit(self.n_layers, complete=True)

    def _through_head(self, pool: ThreadPoolExecutor, report: Callable[[int], None]) -> None:
        with self.forward.head() as logits:
            micro_batch = partial(self._head_backward, logits)
            self._for_all_samples(pool, micro_batch, {HEAD: self.forward.output.weight}, report)

    def _head_backward(self, logits: Callable[[torch.Tensor], torch.Tensor], start: int, stop: int) -> None:
        states = self.forward.hidden_states(start, stop)
        for sample, rows in enumerate(states, start):
            uniform = np.random.default_rng([self.seed, sample]).random(len(rows))
            for span in self.forward.logit_spans(len(rows)):
                inputs = rows[span].clone().requires_grad_()
                outputs = logits(inputs)
                outputs.backward(self._loss_gradient(outputs.detach(), sample, span, uniform))
                assert inputs.grad is not None
                rows[span] = inputs.grad  # the hidden states make room for their gradients
        self._checkpoint.hidden(0).write(start, states)

    def _loss_gradient(self, logits: torch.Tensor, sample: int, positions: slice, uniform: np.ndarray) -> torch.Tensor:
        """Of the cross-entropy by the logits [n, vocabulary] at these positions: the predicted probabilities, less one
        at the label."""
        probabilities = logits.float().softmax(-1)
        if self.labels == "sampled":
            labels = draw(probabilities, torch.from_numpy(uniform[positions]))
            labelled = slice(None)
        else:
            following = self.forward.tokens[sample, positions.start + 1 : positions.stop + 1].astype(np.int64)
            labels = torch.from_numpy(following).to(logits.device)
            labelled = slice(len(labels))
            probabilities[len(labels) :] = 0
        probabilities[labelled].scatter_add_(1, labels[:, None], -torch.ones_like(labels[:, None], dtype=torch.float))
        return probabilities.to(logits.dtype)

    def _through_layers(
        self, pool: ThreadPoolExecutor, report: Callable[[int, int], None], should_stop: ShouldStop
    ) -> None:
        calls = self.forward.layer_calls(self.forward.sequence_length)
        order = range(self.n_layers - 1 - self._checkpoint.layers_done, -1, -1)
        with closing(self.forward.layers_in_turn(order)) as turns:
            for index, weights in turns:
                done = self.n_layers - index
                micro_batch = partial(self._layer_backward, calls[index], index)
                self._for_all_samples(pool, micro_batch, weights, partial(report, done))
                self._commit(done)
                if should_stop():
                    raise Interrupted(f"stopped after layer {index + 1}, {index} of {self.n_layers} to go")

    def _layer_backward(self, call: LayerCall, index: int, start: int, stop: int) -> None:
        done = self.n_layers - index
        states = self.forward.hidden(index).read(start, stop).to(self.forward.device).requires_grad_()
        gradients = self._checkpoint.hidden(done - 1).read(start, stop).to(self.forward.device)
        call(states).backward(gradients)
        assert states.grad is not None
        self._checkpoint.hidden(done).write(start, states.grad)

    def _through_embedding(self, report: Callable[[int], None]) -> None:
        """What an embedding does to the rows that it looks up, such as scaling them, is between their gradient and
        that of the first layer's input."""
        gradients = self._checkpoint.hidden(self.n_layers)
        with self.forward.resident(self.forward.embedding):
            for start, stop in self.forward.micro_batches(self._batch):
                tokens = self.forward.token_tensor(start, stop)
                with _LookedUp() as rows:
                    states = self.forward.embedding(tokens)
                states.backward(gradients.read(start, stop).to(self.forward.device))
                seen = self.observer.fresh()
                seen.observe_lookup(EMBEDDING, self.forward.embedding.num_embeddings, tokens, rows.gradients())
                self.observer.merge(seen)
                report(stop)

    def _for_all_samples(
        self,
        pool: ThreadPoolExecutor,
        micro_batch: Callable[[int, int], None],
        weights: Mapping[str, torch.Tensor],
        report: Callable[[int], None],
    ) -> None:
        for samples_done in self.forward.for_all_samples(pool, micro_batch, weights, self.observer, self._batch):
            report(samples_done)

    def _commit(self, layers_done: int, complete: bool = False) -> None:
        self._checkpoint.commit(layers_done, self.observer.to_arrays(), complete)


class _LookedUp(TorchFunctionMode):
    """While active, the rows that an embedding looks up are where gradients end."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.embedding:
            self.rows = result.requires_grad_()
        return result

    def gradients(self) -> torch.Tensor:
        return self.rows.grad
