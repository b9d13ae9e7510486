"""What moves between host and GPU: weights on the way there while a layer computes, statistics on the way back once a
layer."""

from collections.abc import Sequence

import numpy as np
import torch


class WeightTransfer:
    """Takes weights to a device.

    To a GPU of CUDA they go from pinned memory, by a stream of its own: a layer's weights travel while the layer before
    it computes. torch keeps pinned memory for the next weights of the size, when the copy from it has ended.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Memory of the host of this shape and dtype, to be filled and sent."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self._stream is not None)

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """The values on the device, or on their way; `arrive` comes before their use. From any thread."""
        if self._stream is None:
            return values.to(self.device)
        with torch.cuda.stream(self._stream):
            sent = values.to(self.device, non_blocking=True)
        # The allocator may give the memory to the next weights only when what computes with these has ended.
        sent.record_stream(torch.cuda.current_stream(self.device))
        return sent

    def arrive(self) -> None:
        """What is computed from here on waits for all that was sent; the host does not."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)


def to_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The tensors, of one device, as arrays, in one copy for all of a dtype."""
    arrays: dict[int, np.ndarray] = {}
    for dtype in {tensor.dtype for tensor in tensors}:
        chosen = [i for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensors[i].reshape(-1) for i in chosen]).cpu().numpy()
        ends = np.cumsum([tensors[i].numel() for i in chosen])
        for i, part in zip(chosen, np.split(flat, ends[:-1]), strict=True):
            arrays[i] = part.reshape(tuple(tensors[i].shape))
    return [arrays[i] for i in range(len(tensors))]
