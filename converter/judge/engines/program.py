"""Loads a directory in an engine and generates; with vLLM scores token sequences, too, where there are some.

A program for the Python that has the engine, which need not have this project: it imports nothing of it. See ask.py.
"""

import json
import math
import os
import sys
from typing import Any


def _by_vllm(request: dict[str, Any]) -> dict[str, Any]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if request["tensor_parallel"] == 1:  # in this process, whose errors are then its own
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm

    tokens = request["tokens"]
    length = len(tokens[0]) if tokens else 0
    engine = vllm.LLM(
        model=request["directory"],
        tensor_parallel_size=request["tensor_parallel"],
        enforce_eager=True,
        max_model_len=max(256, length + request["n_tokens"] + 8),
        max_num_seqs=4,
    )
    greedy = vllm.SamplingParams(max_tokens=request["n_tokens"], temperature=0, logprobs=0)
    written = engine.generate([request["prompt"]], greedy)[0].outputs[0]
    chosen = [found[token].logprob for token, found in zip(written.token_ids, written.logprobs, strict=True)]
    answer = {"runtime": f"vLLM {vllm.__version__}", "text": written.text, "log_probabilities": chosen}
    return answer | ({"perplexity": _perplexity(engine, tokens)} if tokens else {})


def _perplexity(engine: Any, tokens: list[list[int]]) -> float:
    """Over the second half of every sequence; all are of one length."""
    import vllm

    length = len(tokens[0])
    scored = engine.generate(
        [{"prompt_token_ids": ids} for ids in tokens],
        vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
    )
    losses = [
        -answer.prompt_logprobs[i][ids[i]].logprob
        for ids, answer in zip(tokens, scored, strict=True)
        for i in range(length // 2 + 1, length)
    ]
    loss = sum(losses) / len(losses)
    return math.exp(loss) if loss < 700 else math.inf  # of NaN, too


def _by_transformers(request: dict[str, Any]) -> dict[str, Any]:
    import compressed_tensors  # noqa: F401  without it transformers says so, with a line for another system
    import torch
    import transformers

    directory = request["directory"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False)
    prompt = tokenizer(request["prompt"], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        written = model.eval().generate(
            prompt,
            max_new_tokens=request["n_tokens"],
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = written.sequences[0, prompt.shape[1] :]
    logits = torch.stack(written.logits)[:, 0].float()
    chosen = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return {
        "runtime": f"transformers {transformers.__version__}",
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "log_probabilities": chosen.tolist(),
    }


def main() -> None:
    request = json.load(sys.stdin)
    try:
        answer = {"vllm": _by_vllm, "transformers": _by_transformers}[request["engine"]](request)
    except ModuleNotFoundError as error:
        answer = {"missing": error.name}
    except Exception as error:  # whatever it is, it is what the engine says of the directory
        answer = {"error": f"{type(error).__name__}: {error}"}
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
