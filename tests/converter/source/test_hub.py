"""Hub models, served by a small Hub on this machine, in processes of their own: the endpoint is read at import."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import PoolingType
from safetensors.torch import load_file, save_file

from tests import tiny_models
from tests.converter.source.hub_server import COMMIT, REPOSITORY, HubServer, serve
from tests.converter.source.quantized.coded_models import write_pair
from tests.converter.source.quantized.stored_codes import KINDS
from tests.converter.source.test_lora import pair
from tests.converter.source.test_lora import write as write_adapter
from tests.tiny_architectures import ALL_TINY_MODELS

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, sys
from bitwright.converter.source.open import open_checkpoint
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.stored_rows import read_rows
from bitwright.formats.errors import ConvertError

model, metadata_only = sys.argv[1], sys.argv[2] == "metadata"
try:
    checkpoint = open_checkpoint(model, metadata_only=metadata_only)
    model_map = describe(checkpoint)
    answer = {
        "model_id": checkpoint.model_id,
        "revision": checkpoint.revision,
        "name": model_map.metadata["general.name"].value,
        "organization": model_map.metadata["general.organization"].value,
        "tensors": [[spec.name, spec.shape] for spec in model_map.tensors],
        "notes": model_map.notes,
        "pooling": next((str(v.value) for k, v in model_map.metadata.items() if k.endswith(".pooling_type")), None),
        "files": checkpoint.files(),
        "weights": sorted(path.name for path in checkpoint.location.glob("*.safetensors")),
    }
    checkpoint = checkpoint.with_weights()
    spec = model_map.tensor("output_norm.weight")
    answer["files_with_weights"] = checkpoint.files()
    answer["norm"] = read_rows(checkpoint, spec, 0, 1).tolist()
except ConvertError as error:
    answer = {"what": error.what, "remedy": error.remedy}
print(json.dumps(answer))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A sharded checkpoint with files that no conversion needs."""
    directory = tmp_path / "repository"
    tiny_models.build("llama", directory)
    for unneeded in ("pytorch_model.bin", "consolidated.safetensors", "model.onnx"):
        (directory / unneeded).write_bytes(b"unneeded")
    return directory


def open_in_process(server: HubServer, home: Path, model: str, mode: str, **environment: str) -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, model, mode],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_metadata_first_then_the_weights(repository: Path, tmp_path: Path) -> None:
    with serve(repository) as server:
        answer = open_in_process(server, tmp_path / "home", REPOSITORY, "metadata")
        ranges = {span for _, name, span in server.requests if name.startswith("model-")}
    assert (answer["model_id"], answer["revision"]) == (REPOSITORY, COMMIT)
    assert (answer["name"], answer["organization"]) == ("Tiny", "Org")
    assert answer["weights"] == []  # described from headers alone
    assert "bytes=0-100000" in ranges
    assert ["token_embd.weight", [400, 64]] in answer["tensors"]
    assert len(answer["norm"][0]) == 64
    assert answer["files_with_weights"] == answer["files"]
    assert server.downloaded() == {
        path.name for path in repository.iterdir() if path.suffix == ".json" or path.name.startswith("model-")
    }


def test_a_plan_foresees_the_download_and_a_run_counts_it(repository: Path, tmp_path: Path) -> None:
    weights = sum(path.stat().st_size for path in repository.glob("model-*.safetensors"))
    events = tmp_path / "events.jsonl"
    convert = ["--profile", "uniform-8bit", "--judge", "off", "--events", events, "--output", tmp_path / "m.gguf"]
    with serve(repository) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")}
        environment |= {"BITWRIGHT_CACHE": str(tmp_path / "cache")}
        for arguments in (["plan", "--profile", "uniform-8bit", "--json"], convert):
            command = [sys.executable, "-m", "bitwright.converter", *map(str, arguments), REPOSITORY]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            if arguments[0] == "plan":
                foreseen = json.loads(done.stdout)["forecast"]
    assert foreseen["steps"][0]["stage"] == "download" and 0 < foreseen["download_bytes"] <= weights
    told = [json.loads(line) for line in events.read_text().splitlines()]
    first, *later = (event for event in told if event["event"] == "forecast")
    assert first["download_bytes"] == foreseen["download_bytes"] and later[-1]["download_bytes"] == 0
    started = [event["stage"] for event in told if event["event"] == "stage_start"]
    assert started[:2] == ["plan", "download"]
    kept = [json.loads(line) for line in (tmp_path / "cache" / "rates.jsonl").read_text().splitlines()]
    assert [rate["amount"] for rate in kept if rate["stage"] == "download"] == [foreseen["download_bytes"]]


def test_finished_files_are_kept_and_serve_offline(repository: Path, tmp_path: Path) -> None:
    with serve(repository) as server:
        first = open_in_process(server, tmp_path / "home", f"{REPOSITORY}@main", "all")
        server.requests.clear()
        second = open_in_process(server, tmp_path / "home", f"{REPOSITORY}@{COMMIT}", "metadata")
        assert server.requests == []
    offline = open_in_process(server, tmp_path / "home", REPOSITORY, "all", HF_HUB_OFFLINE="1")
    assert first == second == offline


@pytest.mark.parametrize(
    ("model", "what"),
    [
        ("org/absent", "the Hub has no such repository, or it is private"),
        (f"{REPOSITORY}@absent", "the repository has no such revision"),
    ],
)
def test_errors_of_the_hub(repository: Path, tmp_path: Path, model: str, what: str) -> None:
    with serve(repository) as server:
        assert open_in_process(server, tmp_path / "home", model, "metadata")["what"] == what


def test_a_single_file_comes_before_an_index(repository: Path, tmp_path: Path) -> None:
    tensors = {k: v for path in repository.glob("model-*") for k, v in load_file(path).items()}
    save_file(tensors, repository / "model.safetensors", {"format": "pt"})
    with serve(repository) as server:
        answer = open_in_process(server, tmp_path / "home", REPOSITORY, "metadata")
    (note,) = answer["notes"]
    assert note.startswith("model.safetensors is read, as transformers does, and neither model.safetensors.index.json")
    assert answer["files_with_weights"] == answer["files"]
    weights = {name for name in server.downloaded() if name.endswith(".safetensors")}
    assert weights == {"model.safetensors"}


def test_fused_experts_are_told_apart_before_the_weights_are_here(repository: Path, tmp_path: Path) -> None:
    for path in repository.iterdir():
        path.unlink()
    tiny_models.build("qwen3_moe", repository)
    weights = load_file(repository / "model.safetensors")
    stem = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    for layer in range(2):
        parts = {
            part: torch.stack([weights.pop(stem.format(layer, expert, part)) for expert in range(8)])
            for part in ("gate", "up", "down")
        }
        weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        weights[f"model.layers.{layer}.mlp.experts.down_proj"] = parts["down"]
    save_file(weights, repository / "model.safetensors", {"format": "pt"})
    with serve(repository) as server:
        answer = open_in_process(server, tmp_path / "home", REPOSITORY, "metadata")
    assert ["blk.1.ffn_gate_exps.weight", [8, 32, 64]] in answer["tensors"]
    assert answer["files_with_weights"] == answer["files"]


def test_a_model_that_embeds_pools_as_its_repository_says(tmp_path: Path) -> None:
    model = tiny_models.checkpoint("qwen3-embedding", ALL_TINY_MODELS["qwen3-embedding"])
    with serve(model) as server:
        answer = open_in_process(server, tmp_path / "home", REPOSITORY, "metadata")
    assert answer["pooling"] == str(int(PoolingType.LAST))
    identified = {name for name, *_ in answer["files"]}
    assert {"modules.json", "1_Pooling/config.json"} <= identified & server.downloaded()
    assert answer["files_with_weights"] == answer["files"]


@pytest.mark.parametrize("change", ["none", "all", "one value"])
def test_a_head_that_may_be_the_embedding(repository: Path, tmp_path: Path, change: str) -> None:
    """Some places of both are compared before the weights are here, and all of them when they are."""
    for path in repository.iterdir():
        path.unlink()
    tiny_models.build("llama-tied", repository)
    weights = load_file(repository / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    if change == "all":
        head *= 2
    elif change == "one value":
        head[62, 10] += 1  # between two of the places
    save_file({**weights, "lm_head.weight": head}, repository / "model.safetensors", {"format": "pt"})
    with serve(repository) as server:
        answer = open_in_process(server, tmp_path / "home", REPOSITORY, "metadata")
        if change == "one value":
            assert answer["what"].startswith("the head was taken for the embedding, after comparing some places")
            assert answer["remedy"].startswith("run the same command again")
            answer = open_in_process(server, tmp_path / "home", REPOSITORY, "metadata")
    assert (["output.weight", [400, 64]] in answer["tensors"]) == (change != "none")
    assert answer["files_with_weights"] == answer["files"]


def test_a_repository_of_pickles(repository: Path, tmp_path: Path) -> None:
    for path in repository.glob("model*.safetensors*"):
        path.unlink()
    with serve(repository) as server:
        answer = open_in_process(server, tmp_path / "home", REPOSITORY, "metadata")
    assert "lacks a file" in answer["what"]
    assert "converted to safetensors" in answer["remedy"]


def test_no_network(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        pass
    answer = open_in_process(server, tmp_path / "home", REPOSITORY, "metadata")
    assert "network" in answer["remedy"]


def test_a_quantized_model_is_described_by_its_headers(tmp_path: Path) -> None:
    """Its scales are fetched with its weights, and are part of what a job is compared by."""
    coded, _ = write_pair(tmp_path, "llama-256", KINDS["FP8 in blocks of 128x128"])
    with serve(coded) as server:
        answer = open_in_process(server, tmp_path / "home", REPOSITORY, "metadata")
        assert "model.safetensors" in server.downloaded()  # by with_weights
    assert any("decoded on reading" in note for note in answer["notes"])
    assert answer["files"] == answer["files_with_weights"]
    # What bitsandbytes stores of a matrix is said within the weights.
    coded, _ = write_pair(tmp_path / "other", "llama-256", KINDS["NF4"])
    with serve(coded) as server:
        answer = open_in_process(server, tmp_path / "second", REPOSITORY, "metadata")
    assert any("weights are NF4 of bitsandbytes: decoded on reading" in note for note in answer["notes"])


def test_an_adapter_is_merged_into_the_base_that_it_states(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_models.build("llama-256", base)
    module = "model.layers.0.mlp.up_proj"
    write_adapter(tmp_path / "adapter", base, pair(module, torch.Size((512, 256))))
    with serve(tmp_path / "adapter") as server:
        answer = open_in_process(server, tmp_path / "home", REPOSITORY, "metadata")
    assert answer["model_id"] == REPOSITORY
    assert any("is merged into base: 1 matrices are adapted" in note for note in answer["notes"])
    assert "adapter_model.safetensors" in [name for name, _, _ in answer["files"]]
