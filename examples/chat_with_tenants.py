"""Two tenants that chat at once; each is served fairly and sees its own cache only.

Run: vllm serve MODEL --radix.tenant cache_salt --enable-prompt-tokens-details, then
python examples/chat_with_tenants.py http://localhost:8000/v1
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import openai

SYSTEM = "You are the guide of a museum and answer in one short sentence. " * 12
QUESTIONS = ("What is there to see?", "How long does it take?", "Thank you, goodbye.")


def chat(client: openai.OpenAI, model: str, tenant: str) -> list[str]:
    """Return a line for each turn of a conversation."""
    messages: list = [{"role": "system", "content": SYSTEM}]
    lines = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        reply = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=16,
            temperature=0,
            # Requests of another salt share no KV with these.
            extra_body={"cache_salt": tenant},
        )
        messages.append(
            {"role": "assistant", "content": reply.choices[0].message.content}
        )
        details = reply.usage.prompt_tokens_details
        cached = details.cached_tokens if details else 0
        lines.append(
            f"{tenant}: {cached} of {reply.usage.prompt_tokens} prompt tokens cached"
        )
    return lines


def main() -> None:
    """Chat as two tenants and print what was cached."""
    client = openai.OpenAI(base_url=sys.argv[1], api_key="none")
    model = client.models.list().data[0].id
    with ThreadPoolExecutor() as pool:
        for lines in pool.map(lambda name: chat(client, model, name), ("one", "two")):
            print("\n".join(lines))


if __name__ == "__main__":
    main()
