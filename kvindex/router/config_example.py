"""What `kvindex config example router` prints: every field, commented, at its default unless it says otherwise."""

EXAMPLE = """\
# kvindex router: sends each request to the engine that will answer it first.
#   kvindex config check router router.yaml      kvindex router -c router.yaml
listen: 127.0.0.1:8080             # clients; also /metrics /healthz /readyz /debug/explain/<request-id>
#admin: 127.0.0.1:9080             # a second listener with the same paths, for a scraper that may not reach the first
#tls: {cert: server.pem, key: server.key}
#token_file: /run/secrets/kvindex  # clients then send `authorization: Bearer <token>`

# The engines. `name` is what the index calls them: the middle of the topic kv@NAME@model.
endpoints:
  - {name: pod-1, url: "http://127.0.0.1:8000"}
#  - {name: pod-2, address: 10.0.0.8, port: 8000, model: my-model, weight: 2.0, data_parallel_size: 2}

# The same entries (`endpoints: [...]`, llm-d's file-discovery form) in a file that is read again when it changes.
#endpoints_file: endpoints.yaml

# Who knows where a prefix is: `embedded` (this process listens to the engines itself), a daemon, or `none` (load only).
index: embedded
#index: {grpc: "127.0.0.1:50151", timeout_seconds: 0.25, ca: ca.pem, token_file: /run/secrets/kvindex}
publishers: []                     # for `embedded`: sources that no engine tells of, as in the daemon's config

# Model name -> folder with tokenizer.json and the chat template. Without it only prompts of token ids have a prefix.
tokenizers: {}
#  my-model: /models/my-model

scoring:
  policy: score                    # score (prefix and load), load, or round-robin
  prefill_tokens_per_second: 8000  # of one engine, uncached
  request_cost_seconds: 0.01       # what one more request there costs this one
  waiting_cost_seconds: 0.2        # what one that waits in the engine's queue costs
  prefix_weight: 1.0
  load_weight: 1.0

retry: {max_attempts: 3, backoff_seconds: 0.5, max_backoff_seconds: 8.0}   # an endpoint that refuses rests

timeouts:
  request_seconds: 120             # from a request's first byte to its last
  keepalive_seconds: 75
  client_stall_seconds: 60
  tokenize_seconds: 2              # later than this, a request is routed without its prefix, and marked
  connect_seconds: 3
  first_byte_seconds: 600
  idle_seconds: 300
  upstream_keepalive_seconds: 4    # below the engines' own (vLLM: 5)
  drain_seconds: 30

limits:
  max_header_bytes: 32768
  max_headers: 128
  max_body_bytes: 67108864
  max_buffered_bytes: 1073741824   # all request bodies together
  max_connections: 20000
  max_idle_per_endpoint: 256
  max_tokenizing: 64

scrape_interval_seconds: 1
explain_requests: 1024             # how many recent picks /debug/explain remembers
log: info
"""
