"""What a server tells of radix: counted in the engine, shown at ``/metrics``.

``series`` lists every metric once; the rest reads that list::

    tally      plain numbers, counted where things happen, in the engine's process
    sampler    what of them is new since the last sample, twice a second
    wire       how a sample travels beside vLLM's own statistics
    collector  the Prometheus metrics, and a line in the log, in the front end
"""
