"""What `kvindex config example daemon` prints: every field, commented, at its default unless it says otherwise."""

NODE = """\
# kvindex daemon: takes KV-cache events in, answers where a prefix is.
#   kvindex config check daemon node.yaml      kvindex daemon -c node.yaml
# Everything is optional. With no engines and no publishers the daemon indexes the vLLM at http://127.0.0.1:8000.

# Inference servers. Each is asked where it publishes (GET /kv_event_sources), again whenever it comes back.
engines:
  - http://127.0.0.1:8000
#  - url: http://10.0.0.7:8000
#    name: pod-7                    # endpoint name in scores; default: pod of topic kv@pod@model, else host:port
#    model: my-model                # only if neither topic nor engine tells
#    eagle: false                   # true when the engine drafts with EAGLE or MTP (nothing on the wire says so)
#    persistent_tiers: []           # tiers that survive an engine restart, for example [filesystem]
#    offload_chunk_tokens: 256      # tokens per chunk of the engine's own offloading, if it is not a block
#    fallback: tcp://10.0.0.7:5557  # where to listen when the engine does not tell (vLLM before 0.31)

# ZMQ publishers that no engine announces.
publishers: []
#  - source: tcp://10.0.0.8:5557
#    replay: tcp://10.0.0.8:5657    # the engine's replay socket; without it, lost messages fence the publisher
#    topic: ""                      # take only topics that begin with this
#    bind: false                    # true: we bind, engines connect (source tcp://*:5557)
#    endpoint: pod-8                # ties the publisher to an endpoint's name
#    model: my-model
#    eagle: false
#    persistent_tiers: []

# The same entries (`publishers: [...]`) in a file that is read again when it changes.
#publishers_file: publishers.yaml

listen:
  grpc: 127.0.0.1:50151
  http: 127.0.0.1:9151             # /metrics /healthz /readyz /debug/publishers

# Needed as soon as a listener leaves the host (or say allow_insecure: true).
#tls: {cert: server.pem, key: server.key, client_ca: clients.pem}
#token: secret                     # clients send `authorization: Bearer secret`
#token_file: /run/secrets/kvindex  # better than a token in this file
allow_insecure: false

# For plain prompts (GetPodScores, kvindex score --prompt): model name -> folder with tokenizer.json.
tokenizers: {}
#  my-model: /models/my-model

index:
  weights: {hbm: 1.0, dram: 0.8, filesystem: 0.5, object: 0.3}   # any other tier: 0.3
  on_lost_messages: fence          # fence: what a lost removal would over-credit is not scored; keep: it is
  max_forgotten_blocks: 1000000    # evicted blocks remembered, so that late children still attach
  cost:                            # what seconds_saved is computed from
    prefill_tokens_per_second: 8000
    tiers:
      dram: {latency_seconds: 0.0005, tokens_per_second: 400000}
      filesystem: {latency_seconds: 0.005, tokens_per_second: 60000}
      object: {latency_seconds: 0.05, tokens_per_second: 20000}

# What may wait between the sockets and the index. Overflow is dropped, counted, and asked for again.
queue: {max_messages: 20000, max_bytes: 268435456}

limits:
  max_request_bytes: 16777216
  max_prompt_tokens: 2000000
  max_streams: 1000

probe_interval_seconds: 5          # ask a silent publisher's replay socket whether something was lost
connect_deadline_seconds: 30       # after this /readyz no longer waits for a publisher
drain_deadline_seconds: 10         # SIGTERM: let calls in flight end for this long

log: {level: info, format: auto}   # auto: JSON unless stderr is a terminal
"""
