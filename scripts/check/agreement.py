"""How llama.cpp's predictions agree with our own evaluation of the same file, over tiny models of every architecture.

    python -m scripts.check.agreement [--model NAME ...] [--formats F32,Q8_0,Q4_0]

Prints a Markdown table: the mean KL divergence in nats and the relative error of the logits, by model and format of all
its matrices. F32 shows that both compute the same; the others show what llama.cpp's rounding of inputs costs. Ends with
exit code 1 when one disagrees. Needs xllamacpp, and the tests beside the scripts.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bitwright.calibration.control import never
from bitwright.converter import convert
from bitwright.converter.artifact.grades import DISAGREES
from bitwright.converter.job.cache import SourceCache
from bitwright.converter.job.progress import Progress
from bitwright.converter.judge.agreement import SAMPLE_TOKENS, runtime_agreement
from bitwright.converter.judge.judging import Judging
from bitwright.converter.judge.open import open_artifact
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from tests import tiny_models


def agreement(model: Path, format_name: str, directory: Path) -> dict[str, Any]:
    """What llama.cpp and we compute of the model with all matrices in that format. directory: for what is written."""
    artifact = directory / f"{format_name}.gguf"
    convert(str(model), "uniform-8bit", artifact, (f"*={format_name}",), quiet=True, judge="off")
    checkpoint = open_checkpoint(str(model))
    work_dir = directory / format_name
    work_dir.mkdir()
    judging = Judging(
        checkpoint,
        describe(checkpoint),
        work_dir,
        text="embedded",
        samples=1,
        sequence_length=SAMPLE_TOKENS,
        seed=0,
        device="cpu",
        threads=1,
        progress=Progress(quiet=True),
        should_stop=never,
        cache=SourceCache(None, checkpoint, "cpu", Progress(quiet=True)),
    )
    candidate = open_artifact(artifact, judging.model_map).candidate()
    return runtime_agreement(judging, candidate, quality={"mean_kld": None})


def cell(found: dict[str, Any]) -> str:
    if found["logits"] is None:
        return "; ".join([*found["reasons"], *found["unchecked"]])
    text = f"{found['logits']['mean_kld']:.1e}, {found['logits']['relative_error']:.1e}"
    return f"{text} ({found['verdict']})" if found["verdict"] == DISAGREES else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=sorted(tiny_models.TINY_MODELS), help="all by default")
    parser.add_argument("--formats", default="F32,Q8_0,Q4_0", help="of all matrices; none that needs importance")
    options = parser.parse_args()
    formats = options.formats.split(",")
    print(f"| model | {' | '.join(formats)} | texts cut alike |\n|---|{'---|' * (len(formats) + 1)}")
    disagrees = False
    for name in options.model or tiny_models.TINY_MODELS:
        with tempfile.TemporaryDirectory() as directory:
            model = Path(directory) / name
            tiny_models.build(name, model)
            found = [agreement(model, format_name, Path(directory)) for format_name in formats]
        disagrees |= any(one["verdict"] == DISAGREES for one in found)
        alike = f"{found[0]['texts'] - len(found[0]['cuts'])} of {found[0]['texts']}"
        print(f"| {name} | {' | '.join(map(cell, found))} | {alike} |", flush=True)
    sys.exit(disagrees)


if __name__ == "__main__":
    main()
