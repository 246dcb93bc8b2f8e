"""Text for the workloads: plain English made from hand-written parts.

Seeded and unlimited. What a prompt says does not matter to a cache; that it is
real text, in the model's own tokens, with the lengths of real prompts, does.
"""

import random

_WHO = (
    "The harbour office", "A retired surveyor", "The night shift", "Our neighbour",
    "The village baker", "A young botanist", "The ferry crew", "An old teacher",
    "The museum's curator", "A visiting engineer", "The weather station",
    "The council's clerk", "A travelling musician", "The orchard's owner",
)  # fmt: skip
_DID = (
    "kept a careful record of", "spent the winter repairing", "asked twice about",
    "could not explain", "sold a third of", "wrote a long letter about",
    "measured the depth of", "argued against", "built a small model of",
    "refused to move", "lost the only copy of", "drew a map of",
)  # fmt: skip
_WHAT = (
    "the stone bridge", "the tide tables", "a crate of brass lamps", "the east wall",
    "the apple harvest", "the town's oldest clock", "three blue notebooks",
    "the railway timetable", "the flooded cellar", "a telescope without a lens",
    "the beekeeper's accounts", "the road over the pass",
)  # fmt: skip
_WHEN = (
    "before the first frost", "while the ice was thin", "in the year of the comet",
    "on the longest day", "after the market closed", "during the second strike",
    "when the river was low", "without telling anyone", "at the end of a dry May",
    "as the guests arrived", "between two storms", "to everyone's surprise",
)  # fmt: skip
_ASK = (
    "Who was responsible, and what is the evidence", "What changed in the end",
    "Which detail seems least likely", "How would you sum this up in one line",
    "What should be done first", "Which two facts belong together",
    "What is missing from this account", "Why did nobody object",
)  # fmt: skip


def sentence(rng: random.Random) -> str:
    """Return one sentence, about 16 tokens."""
    number = rng.randrange(2, 999)
    return (
        f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)} "
        f"{rng.choice(_WHEN)}, item {number}."
    )


def question(rng: random.Random) -> str:
    """Return a question about a text."""
    return f"{rng.choice(_ASK)}? Refer to item {rng.randrange(2, 999)}."


def worked_example(rng: random.Random) -> str:
    """Return a question with its answer, as few-shot prompts have them."""
    a, b, c = (rng.randrange(2, 90) for _ in range(3))
    who = rng.choice(_WHO)
    return (
        f"Q: {who} had {a} crates, bought {b} more and then gave away {c}. "
        f"How many crates are left?\nA: {a} plus {b} is {a + b}; minus {c} "
        f"leaves {a + b - c}. The answer is {a + b - c}.\n\n"
    )


def open_example(rng: random.Random) -> str:
    """Return a question of that kind without its answer."""
    return worked_example(rng).split("A:")[0] + "A:"
