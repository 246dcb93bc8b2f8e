"""The radix tree without vLLM: tokens in, block ids out.

Run: python examples/tree_by_itself.py
"""

from vllm_radix.tree import RadixTree, encode


def main() -> None:
    """Insert two prompts that share a beginning; match, release and evict."""
    tree = RadixTree(block_size=2)
    # Two requests hold blocks 0, 1 and 0, 2: the first two tokens are shared.
    tree.insert(encode([1, 2, 3, 4]), [0, 1])
    tree.insert(encode([1, 2, 5, 6]), [0, 2], start=1)
    print(tree.dump())

    # A third prompt finds one whole block, and one token of another.
    print(tree.match(encode([1, 2, 5, 9]), partial=True))

    # The requests end, from the tail: their blocks are idle now, and still cached.
    tree.release([1, 2])
    tree.release([0])
    print("cached blocks:", tree.match(encode([1, 2, 3, 4])).blocks)

    # Room for one block is needed: the one that is idle for longest goes.
    print("evicted:", tree.evict(1))
    print("cached blocks:", tree.match(encode([1, 2, 3, 4])).blocks)


if __name__ == "__main__":
    main()
