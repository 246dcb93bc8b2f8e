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

    def call(name: str, prompt: str) -> str:
        """Print what was cached of a prompt, and return it with its answer."""
        reply = client.completions.create(
            model=model, prompt=prompt, max_tokens=16, temperature=0
        )
        # None unless the server runs with --enable-prompt-tokens-details.
        details = reply.usage.prompt_tokens_details
        cached = details.cached_tokens if details else "unknown"
        print(f"{name}: {cached} of {reply.usage.prompt_tokens} prompt tokens cached")
        return prompt + reply.choices[0].text

    plan = call("plan", TASK + "\nPlan:")
    with ThreadPoolExecutor() as pool:
        branches = list(
            pool.map(lambda i: call(f"branch {i}", f"{plan}\n{BRANCHES[i]}"), range(3))
        )
        for i, branch in enumerate(branches):
            steps = [f"{branch}\nGo on.", f"{branch}\nStop, and say why."]
            list(pool.map(call, [f"branch {i}.{j}" for j in range(2)], steps))


if __name__ == "__main__":
    main()
