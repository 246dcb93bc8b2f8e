"""Requests with random hints of clients, beside the same without a hint."""


def serve_with_random_hints(
    engine, plain, rng, draw, *, count, hinted, priorities, ids, steps
):
    """Serve random requests; their answers must be those of an engine without hints.

    Args:
        engine: that follows hints; its ``now`` is a clock.
        plain: one with room for everything.
        rng: of everything random.
        draw: returns the tokens of a prompt and the length of its answer.
        count: of requests.
        hinted: share of them with a hint.
        priorities: the least and the most.
        ids: so many that a request may say it replaces.
        steps: of the engine after each request, fewer than so many.
    """
    kinds = {
        "end_session": lambda: True,
        "expect_in": lambda: rng.choice([1, 20]),
        "keep_for": lambda: rng.choice([1, 20]),
        "priority": lambda: rng.randint(*priorities),
        "replaces": lambda: f"r{rng.randrange(ids)}",
    }
    wanted = {}
    for number in range(count):
        engine.now += 1.0
        chosen = rng.choice(list(kinds)) if rng.random() < hinted else None
        hints = {f"radix_{chosen}": kinds[chosen]()} if chosen else {}
        text, length = draw()
        engine.add(f"r{number}", text, length, extra_args=hints)
        wanted[f"r{number}"] = text, length
        for _ in range(rng.randrange(steps)):
            engine.step()
        if rng.random() < 0.1:
            engine.abort(f"r{number}")
            del wanted[f"r{number}"]
    engine.run()
    for name, (text, length) in wanted.items():
        plain.add(name, text, length)
    plain.run()
    assert {name: engine.outputs[name] for name in wanted} == plain.outputs
