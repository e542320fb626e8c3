"""KV-cache events: from an engine's socket to one event model.

    model, tiers                  what everything else speaks; imports nothing of ours
    decode, vllm, sglang, ...     payloads -> model (`decode`)
    frames, sequence, recording   messages, their order, capture files; pure, no I/O but the files
    ordered, replaying            in-order delivery with replay of what was lost
    receiver, inbox, subscriber   the threads and sockets of one source (`Subscriber`)
    sources, intake               where publishers are, and a subscriber for each (`Intake`)

Nothing is re-exported here: `kvindex.events.model` must stay importable without ZMQ.
"""
