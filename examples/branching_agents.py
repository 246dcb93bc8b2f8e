"""An agent that branches twice, and how many tokens of each call were cached.

Run: vllm serve MODEL --radix --enable-prompt-tokens-details, then
python examples/branching_agents.py http://localhost:8000/v1
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import openai

TASK = (
    "You plan the repair of an old clock tower. The clock stands still, the stairs "
    "are rotten, and the bell may not ring while people are inside. " * 8
)
BRANCHES = ("Look at the clock first.", "Look at the stairs first.", "Ask a builder.")


def main() -> None:
    """Run three branches from one plan, and two from each of them."""
    client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
    model = client.models.list().data[0].id

    def call(name: str, prompt: str) -> tuple[str, str]:
        """Return a prompt with its answer, and what was cached of the prompt."""
        reply = client.completions.create(
            model=model, prompt=prompt, max_tokens=16, temperature=0
        )
        # None unless the server runs with --enable-prompt-tokens-details.
        details = reply.usage.prompt_tokens_details
        cached = details.cached_tokens if details else "unknown"
        line = f"{name}: {cached} of {reply.usage.prompt_tokens} prompt tokens cached"
        return prompt + reply.choices[0].text, line

    def at_once(prompts: dict[str, str]) -> dict[str, str]:
        """Send all prompts, print what was cached, return them with their answers."""
        with ThreadPoolExecutor() as pool:
            done = list(pool.map(call, prompts, prompts.values()))
        for _, line in done:
            print(line)
        return {name: text for name, (text, _) in zip(prompts, done, strict=True)}

    plan = at_once({"plan": f"{TASK}\nPlan:"})["plan"]
    starts = {f"branch {i}": f"{plan}\n{start}" for i, start in enumerate(BRANCHES)}
    for name, branch in at_once(starts).items():
        ends = (f"{branch}\nGo on.", f"{branch}\nStop, and say why.")
        at_once({f"{name}.{i}": end for i, end in enumerate(ends)})


if __name__ == "__main__":
    main()
