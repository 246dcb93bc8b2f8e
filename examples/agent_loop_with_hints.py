"""An agent that says when it calls a tool, and when it is done, so that its cache fits.

Run: vllm serve MODEL --radix --enable-prompt-tokens-details, then
python examples/agent_loop_with_hints.py http://localhost:8000/v1
"""

import sys
import time

import openai

TASK = (
    "You look after the greenhouse of a botanical garden. You may ask for the weather, "
    "for the moisture of the soil, and for the opening hours. " * 8
)
TOOLS = {"weather": "Cloudy, 14 degrees.", "soil": "Dry.", "hours": "Until six."}
TOOL_SECONDS = 0.2


def main() -> None:
    """Run the loop and print what was cached of each call."""
    client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
    model = client.models.list().data[0].id
    prompt = TASK

    def call(name: str, hints: dict[str, object]) -> str:
        """Return the answer to the prompt."""
        reply = client.completions.create(
            model=model,
            prompt=prompt,
            max_tokens=16,
            temperature=0,
            extra_body={"vllm_xargs": hints},
        )
        # None unless the server runs with --enable-prompt-tokens-details.
        details = reply.usage.prompt_tokens_details
        cached = details.cached_tokens if details else "unknown"
        asked = reply.usage.prompt_tokens
        print(f"{name}: {cached} of {asked} prompt tokens cached")
        return reply.choices[0].text

    for tool, result in TOOLS.items():
        # A tool runs after this call: the next one comes when it is done.
        prompt += call(f"before {tool}", {"radix_expect_in": TOOL_SECONDS})
        time.sleep(TOOL_SECONDS)
        prompt += f"\nResult of {tool}: {result}\nNext step:"
    # Nothing follows: what only this loop has used may go first.
    call("last", {"radix_end_session": True})
    try:
        call("wrong", {"radix_expect_in": "soon"})
    except openai.BadRequestError as refused:
        print(f"refused: {refused.body['message']}")


if __name__ == "__main__":
    main()
