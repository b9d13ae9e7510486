"""What tuning moves in the blocks of every format, and that what is stored is what it computed with."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from bitwright.calibration.passes.layer_tuning import LayerTask, Place, tune
from bitwright.calibration.stream.anatomy.state import HIDDEN, Layout, PartLayout
from bitwright.converter.gguf.sequence.layers import tunable_tensor
from bitwright.converter.sequence.tunable_tensor import TunableTensor, are_coarse
from bitwright.formats.parts import ScalarBlocks, ScalarParts
from bitwright.formats.registry import FORMATS
from bitwright.profiles.planning.plan import PlannedTensor
from bitwright.profiles.vocabulary import Role, TensorSpec
from tests.formats.draws import typical

N_ROWS, N_COLUMNS, N_SAMPLES, LENGTH = 16, 512, 64, 8
LAYOUT = Layout({HIDDEN: PartLayout((N_ROWS,), (0, 1))})
every_format = pytest.mark.parametrize(
    "block_format", [f for f in FORMATS.values() if are_coarse(f.blocks)], ids=lambda f: f.name
)


@dataclass
class States:
    """In memory what HiddenStates has in a file."""

    values: torch.Tensor

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.values[start:stop]


def encoded(block_format: Any, rows: np.ndarray, scales: tuple[float, ...] = ()) -> TunableTensor:
    options = {"tensor_scale": scales[0]} if scales else {}
    data = block_format.encode(rows, np.ones(N_COLUMNS, np.float32), "fast", **options)
    spec = TensorSpec("blk.0.ffn_down.weight", rows.shape, Role.MLP_DOWN, 0, ("w",))
    return tunable_tensor(spec, PlannedTensor(spec, block_format.name, ""), data, scales)


def task_of(rows: np.ndarray, start: np.ndarray, costs: torch.Tensor | None = None) -> LayerTask:
    """A layer of one matrix, which is `rows` in the source and `start` in the artifact, on correlated inputs."""
    rng = np.random.default_rng(7)
    mixing = rng.standard_normal((N_COLUMNS // 16, N_COLUMNS)) / 4
    inputs = rng.standard_normal((N_SAMPLES, LENGTH, N_COLUMNS // 16)) @ mixing
    states = torch.from_numpy(inputs.astype(np.float32))
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))

    def call(hidden: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, Layout]:
        return hidden @ weight.T, layout

    targets = States(states @ torch.from_numpy(rows).T)
    return LayerTask(
        call,  # type: ignore[arg-type]
        {"w": weight},
        {"w": torch.from_numpy(rows)},
        {"w": Place("w", 0)},
        States(states),  # type: ignore[arg-type]
        targets,  # type: ignore[arg-type]
        0,
        N_SAMPLES,
        LAYOUT,
        LAYOUT,
        costs,
    )


def tuned(tensor: TunableTensor, task: LayerTask, threads: int = 2, steps: int = 24) -> np.ndarray:
    with ThreadPoolExecutor(threads) as pool:
        data, _ = tensor.tuned(tune(task, tensor.tunable(), steps, 0, pool, task.held_out_error(pool)))
    return data


def rows_to_encode() -> np.ndarray:
    rows, _ = typical(3, N_ROWS, N_COLUMNS)
    return rows


@every_format
def test_what_is_stored_is_what_was_computed_with_and_does_better(block_format):
    rows = rows_to_encode()
    scales = (block_format.tensor_scale(float(np.abs(rows).max())),) if block_format.tensor_scale else ()
    tensor = encoded(block_format, rows, scales)
    decoded = tensor.decode(tensor.data) * (scales[0] if scales else 1)
    task = task_of(rows, decoded)
    with ThreadPoolExecutor(1) as pool:
        before = task.held_out_error(pool)
        data, stored = tensor.tuned(tune(task, tensor.tunable(), 24, 0, pool, before))
        after = task_of(rows, stored).held_out_error(pool)
    np.testing.assert_array_equal(stored, tensor.decode(data) * (scales[0] if scales else 1))
    assert data.shape == tensor.data.shape and after < before
    # What is computed with at the end is what would be stored, but that scales and minima are rounded to float16 then.
    with ThreadPoolExecutor(1) as pool:
        error = task.held_out_error(pool)
    assert abs(error - after) < 0.05 * before or error > after


@every_format
def test_taken_apart_and_put_together_it_is_the_same(block_format):
    tensor = encoded(block_format, rows_to_encode())
    rows = tensor.decode(tensor.data)
    assert np.array_equal(tuned(tensor, task_of(rows, rows), steps=0), tensor.data)


def test_levels_move_by_one_at_most_and_where_the_output_gains():
    rows = rows_to_encode()
    tensor = encoded(FORMATS["Q4_0"], rows)
    blocks = FORMATS["Q4_0"].blocks
    assert isinstance(blocks, ScalarBlocks)
    parts = [blocks.open(data) for data in (tensor.data, tuned(tensor, task_of(rows, tensor.decode(tensor.data))))]
    moved = parts[1].levels.astype(int) - parts[0].levels
    assert set(np.unique(moved)) == {-1, 0, 1} and (moved != 0).mean() < 0.5
    assert not np.array_equal(parts[0].units, parts[1].units)


def test_scales_of_sub_blocks_go_to_values_that_can_be_stored():
    rows = rows_to_encode()
    rows[:, ::32] *= 3
    tensor = encoded(FORMATS["Q4_K"], rows)
    blocks = FORMATS["Q4_K"].blocks
    assert isinstance(blocks, ScalarBlocks)
    before, after = (
        blocks.open(d) for d in (tensor.data, tuned(tensor, task_of(rows, tensor.decode(tensor.data)), steps=64))
    )
    assert isinstance(before, ScalarParts) and not np.array_equal(before.scales, after.scales)
    assert after.scales.min() >= 0 and after.scales.max() < len(blocks.scale_table)


def test_a_costly_channel_gains_more():
    rows = rows_to_encode()
    tensor = encoded(FORMATS["Q2_K"], rows)
    start = tensor.decode(tensor.data)
    costs = torch.full((N_ROWS,), 0.1)
    costs[3] = N_ROWS - 0.1 * (N_ROWS - 1)
    results = {}
    for name, of_channel in (("even", None), ("costly", costs)):
        data = tuned(tensor, task_of(rows, start, of_channel))
        plain = task_of(rows, tensor.decode(data))
        of_one = torch.zeros(N_ROWS)
        of_one[3] = 1.0
        with ThreadPoolExecutor(1) as pool:
            results[name] = replace(plain, costs=of_one).held_out_error(pool)
    assert results["costly"] <= results["even"] * 1.02


def test_the_same_on_one_thread_and_on_four():
    rows = rows_to_encode()
    tensor = encoded(FORMATS["Q3_K"], rows)
    start = tensor.decode(tensor.data)
    one, four = (tuned(tensor, task_of(rows, start), threads) for threads in (1, 4))
    assert np.array_equal(one, four)
