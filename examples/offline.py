"""Complete prompts in this process, without a server and without Ray.

python examples/offline.py ./my-model "Once upon a time" "In the beginning"
"""

from __future__ import annotations

import sys

from giantserve import LLM, SamplingParams


def main(model: str, prompts: list[str]) -> None:
    params = SamplingParams(max_tokens=32, temperature=0.7, seed=1)
    # Sizes and parallelism are the planner's choice. To give less than is free, and see weights
    # move: LLM(model, device_memory="8GiB", host_memory="16GiB"), per shard.
    with LLM(model) as llm:
        print(llm.plan.reason)
        for output in llm.generate(prompts, params):
            print(f"{output.prompt!r} -> {output.text!r} ({output.finish_reason})")
        for shard in llm.stats()["shards"]:
            for link in shard["links"]:
                print(f"{link['source']} to {link['target']}: {link['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
