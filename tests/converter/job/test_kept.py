"""Results that stay in the work directory: computed once, again where they are damaged or answer something else."""

from pathlib import Path
from typing import Any

from bitwright.converter.job.kept import kept_json
from bitwright.converter.job.progress import Progress


class Stage:
    """Counts in its result how often it was computed, and leaves a checkpoint each time."""

    def __init__(self, work_dir: Path):
        self.path, self.scratch, self.n_computed = work_dir / "result.json", work_dir / "scratch", 0

    def _compute(self) -> dict[str, Any]:
        self.n_computed += 1
        self.scratch.mkdir()
        return {"computed": self.n_computed}

    def run(self, least: int = 0) -> int:
        def answers(result: dict[str, Any]) -> bool:
            return bool(result["computed"] >= least)

        result = kept_json(self.path, "result", Progress(), self._compute, self.scratch, answers)
        return int(result["computed"])


def test_a_result_is_computed_once_and_its_checkpoints_go(tmp_path):
    stage = Stage(tmp_path)
    assert [stage.run(), stage.run(), stage.n_computed] == [1, 1, 1]
    assert not stage.scratch.exists()
    stage.scratch.mkdir()  # as a kill leaves it, between the result and the end of the stage
    assert stage.run() == 1 and not stage.scratch.exists()


def test_a_damaged_result_is_said_and_computed_again(tmp_path, capsys):
    stage = Stage(tmp_path)
    stage.run()
    stage.path.write_text('{"computed": 7}')
    assert stage.run() == 2
    assert f"{stage.path}: the result is not what was written there" in capsys.readouterr().err


def test_a_result_that_does_not_answer_is_computed_again_without_a_word(tmp_path, capsys):
    stage = Stage(tmp_path)
    assert [stage.run(), stage.run(least=2), stage.run(least=2)] == [1, 2, 2]
    assert capsys.readouterr().err == ""
