"""The layer stream run backwards: the exact gradients of the whole model's loss, at the memory of one layer.

A forward pass has kept the input of every layer. From the head down one layer is resident at a time: its forward is
computed again from that input, now with a graph, the gradient that the layer above has left is propagated through it,
and the gradient by its input is left for the layer below, in one of two files that take turns.

The loss is the sum over all positions of the cross-entropy with one label each. Labels drawn from the model's own
predictions make the expected square of its gradient the Fisher matrix, which is the curvature of the KL divergence;
they depend on the seed and the sample alone.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from functools import partial
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from bitwright.calibration.choices import Labels
from bitwright.calibration.control import Interrupted, PassControl
from bitwright.calibration.stream.checkpointing import NOT_STARTED
from bitwright.calibration.stream.device.memory import MicroBatch
from bitwright.calibration.stream.forward import LayerStream
from bitwright.calibration.stream.micro_batches import largest_micro_batch
from bitwright.calibration.stream.model import LayerCall
from bitwright.calibration.stream.observer import Observer, ProductTap, locate_matrices
from bitwright.calibration.stream.weights import HEAD


class GradientObserver(Observer, Protocol):
    """An observer of the pass back: it is shown products whose outputs have a gradient to come, for which it may
    register a hook, and at the end the embedding."""

    def observe_lookup(self, parameter: str, n_rows: int, tokens: torch.Tensor, gradients: torch.Tensor) -> None:
        """tokens: int64 [n_samples, sequence_length], the rows that were looked up in a parameter of n_rows;
        gradients: [n_samples, sequence_length, width], by the rows as they were looked up."""

    def fresh(self, first: int) -> Self: ...


class GradientStream:
    """The pass back of a finished forward pass that has kept the input of every layer.

    control: its work directory is this pass's alone. observer: is shown the head's products, those of the layers from
    the last to the first, and the embedding's lookups.
    labels: "sampled" from the model's predictions by the seed, or the next token of the "text", which the last position
    lacks.
    """

    def __init__(
        self, forward: LayerStream, control: PassControl, observer: GradientObserver, *, labels: Labels, seed: int = 0
    ):
        self.output = forward.require_head()
        self.forward, self.control, self.observer, self.labels, self.seed = forward, control, observer, labels, seed
        self.n_layers = len(forward.layers)
        # On a CPU a sequence by itself is as fast, and an observer can tell it from others in every product.
        on_cpu = forward.device.type == "cpu"
        self._batch = MicroBatch(1, 1) if on_cpu else largest_micro_batch(forward.device, forward.sequence_length)
        settings: dict[str, object] = {"labels": labels} | ({"seed": seed} if labels == "sampled" else {})
        if (excerpt := forward.excerpt) is not None:
            settings["samples of the text"] = [excerpt.first, excerpt.n_text]
        self._checkpoint = forward.open_checkpoint(control.work_dir, observer, self._batch, settings)

    @property
    def complete(self) -> bool:
        return self._checkpoint.complete

    def run(self) -> None:
        """Take the gradient of all samples from the head to the embedding, from wherever the checkpoint stands.

        Raises Interrupted after the layer during which the control came to say so, and ConvertError for gradients that
        are not finite.
        """
        self._checkpoint.tell_damage(self.control.progress)
        if not self.complete:
            self._run()
        self._checkpoint.discard_hidden_states()

    def _run(self) -> None:
        report = partial(self.forward.report, "gradients", self.n_layers + 2)
        with self.forward.workers(1 + len(self.forward.copies)) as pool:
            if self._checkpoint.layers_done == NOT_STARTED:
                self._through_head(pool, partial(report, 0))
                self._commit(0)
                if self.control.should_stop():
                    raise Interrupted("stopped after the output head")
            if self._checkpoint.layers_done < self.n_layers:
                self._through_layers(pool, report)
            self._through_embedding(partial(report, self.n_layers + 1))
            self._commit(self.n_layers, complete=True)

    def _through_head(self, pool: ThreadPoolExecutor, report: Callable[[int], None]) -> None:
        arranged = self.forward.arranged
        with self.forward.head() as logits:
            micro_batch = partial(self._head_backward, logits)
            weights = self.forward.weights_after_layers(arranged) | {HEAD: self.output.weight}
            self._for_all_samples(pool, micro_batch, weights, report)

    def _head_backward(self, logits: Callable[[torch.Tensor], torch.Tensor], start: int, stop: int) -> None:
        forward = self.forward
        states = forward.hidden_states(start, stop)
        for sample, rows in enumerate(states, start):
            uniform = np.random.default_rng([self.seed, forward.first + sample]).random(len(rows))
            for span in forward.logit_spans(len(rows)):
                inputs = rows[span].clone().requires_grad_()
                outputs = logits(inputs)
                loss_gradient = self._loss_gradient(outputs.detach(), sample, span, uniform)
                (rows[span],) = torch.autograd.grad(outputs, inputs, loss_gradient)  # in the place of the hidden states
        self._checkpoint.hidden(0).write(start, states)

    def _loss_gradient(self, logits: torch.Tensor, sample: int, positions: slice, uniform: np.ndarray) -> torch.Tensor:
        """The gradient of the cross-entropy by the logits [n, vocabulary] at these positions: the predicted
        probabilities, less one at the label."""
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

    def _through_layers(self, pool: ThreadPoolExecutor, report: Callable[[int, int], None]) -> None:
        forward, calls = self.forward, self.forward.arranged.calls
        order = range(self.n_layers - 1 - self._checkpoint.layers_done, -1, -1)

        def back(call: LayerCall, device: torch.device) -> Callable[[int, int], None]:
            return partial(self._layer_backward, call, device)

        def first(index: int, weights: Mapping[str, torch.Tensor]) -> None:
            here = back(calls[index], forward.device)
            forward.fit(self._batch, forward.observed(here, weights, self.observer))

        turns = forward.layers_in_turn(order, first, forward.copies)
        with closing(turns), deterministic_attention(forward.device):
            for index, (weights, *of_copies) in turns:
                done, here = self.n_layers - index, back(calls[index], forward.device)
                elsewhere = forward.observed_elsewhere(index, of_copies, self.observer, back)
                self._for_all_samples(pool, here, weights, partial(report, done), elsewhere)
                self._commit(done)
                if self.control.should_stop():
                    raise Interrupted(f"stopped after layer {index + 1}, {index} of {self.n_layers} to go")

    def _layer_backward(self, call: LayerCall, device: torch.device, start: int, stop: int) -> None:
        done = self.n_layers - call.index
        states = self.forward.read_states(self.forward.hidden(call.index), start, stop, device).requires_grad_()
        gradients = self.forward.read_states(self._checkpoint.hidden(done - 1), start, stop, device)
        above, _ = call(states, self.forward.layouts[call.index])
        (below,) = torch.autograd.grad(above, states, gradients)
        self._checkpoint.hidden(done).write(start, below)

    def _through_embedding(self, report: Callable[[int], None]) -> None:
        """What a model does to the rows that it looks up, such as scaling them, is between their gradient and that of
        the first layer's input."""
        forward, gradients = self.forward, self._checkpoint.hidden(self.n_layers)
        tables = {f"{name}.weight": table for name, table in forward.body.tables.items()}
        with forward.first_states(forward.arranged) as (weights, first):
            owners = locate_matrices({name: weights[name] for name in forward.arranged.before})
            for start, stop in forward.micro_batches(self._batch.samples):
                tokens, seen = forward.token_tensor(start, stop), self.observer.fresh(forward.first + start)
                with ProductTap(owners, seen), _LookedUp(tables, tokens) as looked_up:
                    states, _ = first(tokens)
                above = forward.read_states(gradients, start, stop)
                of_rows = torch.autograd.grad(states, list(looked_up.rows.values()), above)
                for name, by_row in zip(looked_up.rows, of_rows, strict=True):
                    seen.observe_lookup(name, tables[name].num_embeddings, tokens, by_row)
                self.observer.merge(seen)
                report(stop)

    def _for_all_samples(
        self,
        pool: ThreadPoolExecutor,
        micro_batch: Callable[[int, int], None],
        weights: Mapping[str, torch.Tensor],
        report: Callable[[int], None],
        elsewhere: Sequence[Callable[[int, int], Observer]] = (),
    ) -> None:
        """elsewhere: as of LayerStream.for_all_samples."""
        for samples_done in self.forward.for_all_samples(
            pool, micro_batch, weights, self.observer, self._batch, elsewhere=elsewhere
        ):
            report(samples_done)

    def _commit(self, layers_done: int, complete: bool = False) -> None:
        self._checkpoint.notes = {"micro-batch": self._batch.to_json()}
        self._checkpoint.commit(layers_done, self.observer.to_arrays(), complete)


def deterministic_attention(device: torch.device) -> AbstractContextManager[None]:
    """CUDA's fused attentions add up their gradients in another order every time. The plain one does not, and samples
    of which gradients are taken are short. It is one choice for all threads: make it where these are waited for."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


class _LookedUp(TorchFunctionMode):
    """While active, the rows that these tables look up for these tokens are where gradients end; rows of positions,
    which are the same for all samples, are not. tables: by the name of their weights; rows: the same names -> what was
    looked up."""

    def __init__(self, tables: Mapping[str, torch.nn.Embedding], tokens: torch.Tensor):
        super().__init__()
        self.tokens, self.rows = tokens, dict[str, torch.Tensor]()
        self._names = {table.weight.data_ptr(): name for name, table in tables.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.embedding:
            self._keep(result, *args, **(kwargs or {}))
        return result

    def _keep(self, result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> None:
        if torch.equal(input, self.tokens):
            self.rows[self._names[weight.data_ptr()]] = result.requires_grad_()


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """One index for every row of probabilities [n, k], by inversion of the cumulated ones at uniform numbers [n] of
    [0, 1): int64 [n]. Sums are float64: float32 would never reach the tail of a large vocabulary."""
    # On a CPU: Metal has no float64, and CUDA cumulates in another order every time.
    cumulated = probabilities.cpu().double().cumsum(-1)
    threshold = uniform[:, None] * cumulated[:, -1:]
    drawn = torch.searchsorted(cumulated, threshold, right=True)[:, 0]
    return drawn.clamp_(max=probabilities.shape[-1] - 1).to(probabilities.device)
