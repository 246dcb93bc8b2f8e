"""Prompts of random words: what the tests serve, and who shares what with whom."""

import random


def prompt(seed, length):
    """Return tokens that depend on nothing but ``seed``."""
    rng = random.Random(str(seed))
    return [rng.randrange(3, 50) for _ in range(length)]


def grouped(groups, members, prefix=128, own=20):
    """Prompts that share a prefix by group, interleaved."""
    shared = [prompt(f"group {g}", prefix) for g in range(groups)]
    return {
        f"{g}-{m}": shared[g] + prompt(f"{g} {m}", own)
        for m in range(members)
        for g in range(groups)
    }


class RequestMix:
    """Requests of mixed workloads, with prompts of random words."""

    def __init__(self, seed=0, vocabulary=(1000, 30000)):
        self.rng = random.Random(seed)
        self.vocabulary = vocabulary
        self.requests = []

    def words(self, length):
        return [self.rng.randrange(*self.vocabulary) for _ in range(length)]

    def add(self, tokens, after=None, **fields):
        name = str(len(self.requests))
        fields = {"max_tokens": self.rng.randrange(2, 7), **fields}
        self.requests.append({"id": name, "tokens": tokens, "after": after, **fields})
        return name

    def chat(self, users, turns):
        system = self.words(45)
        for _ in range(users):
            last = self.add(system + self.words(20))
            for _ in range(turns - 1):
                last = self.add(self.words(self.rng.randrange(8, 25)), after=last)

    def rollouts(self, tasks, leaves):
        for _ in range(tasks):
            stem = self.words(self.rng.randrange(80, 110))
            for leaf in range(leaves):
                cut = self.rng.randrange(40, len(stem))
                self.add(stem[:cut] + self.words(12), n=2 if leaf % 4 == 3 else 1)

    def few_shot(self, banks, questions):
        texts = [self.words(75) for _ in range(banks)]
        for _ in range(questions):
            for bank in texts:
                self.add(bank + self.words(10))

    def alone(self, count):
        for _ in range(count):
            self.add(self.words(self.rng.randrange(20, 70)))

    def abort_some(self, every):
        """Abort requests that nothing comes after, some time after they are sent."""
        needed = {request["after"] for request in self.requests}
        for number, request in enumerate(self.requests):
            if number % every == 0 and request["id"] not in needed:
                request["abort_after"] = self.rng.randrange(1, 60)
        self.rng.shuffle(self.requests)


def small_mix(seed):
    mix = RequestMix(seed, vocabulary=(10, 900))
    mix.chat(users=6, turns=3)
    mix.rollouts(tasks=4, leaves=6)
    mix.few_shot(banks=5, questions=4)
    mix.alone(count=10)
    return mix.requests
