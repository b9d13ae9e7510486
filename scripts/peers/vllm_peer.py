"""Loads a directory in a vLLM engine, generates, and scores token sequences; run by the interpreter of .venv-vllm.

A JSON object on the standard input: model (path), tokens (sequences of equal length), prompt (text). The answer is one
line to the file descriptor that the argument names, as libraries print on the standard output: the perplexity over the
second half of every sequence, and the text that follows the prompt.
"""

import json
import math
import os
import sys


def main() -> None:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    length = len(job["tokens"][0])
    engine = LLM(model=job["model"], enforce_eager=True, max_model_len=max(256, length + 32), max_num_seqs=4)
    scored = engine.generate(
        [{"prompt_token_ids": tokens} for tokens in job["tokens"]],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0),
    )
    losses = [
        -answer.prompt_logprobs[i][tokens[i]].logprob
        for tokens, answer in zip(job["tokens"], scored, strict=True)
        for i in range(length // 2 + 1, length)
    ]
    (written,) = engine.generate([job["prompt"]], SamplingParams(max_tokens=24, temperature=0))
    loss = sum(losses) / len(losses)
    perplexity = math.exp(loss) if loss < 700 else math.inf  # of NaN, too
    answer = {"perplexity": perplexity, "text": written.outputs[0].text}
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
