"""The HTTP server: a FastAPI application, and a pool of processes that decode bodies and run the model.

The web process (`app`) checks headers (`guard`), counts bytes (`bodies`) and hands on bodies unread. `batcher` gives
what waits to a process of the `pool`; one that dies or takes too long is replaced, and its bodies are tried again.
`process` is what runs in each.
"""
