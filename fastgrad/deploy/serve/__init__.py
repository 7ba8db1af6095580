"""The HTTP server: a FastAPI application, and a pool of processes that decode bodies and run the model.

The web process (`app`) checks headers, counts bytes and hands on bodies unread. `pool` batches what waits; a process
that dies or takes too long is replaced, and its bodies are tried again. `process` is what runs in each.
"""
