"""The HTTP server: application, worker processes with batching, metrics and a page.

FastAPI and uvicorn, because LitServe (0.2.19) loses accepted requests at SIGTERM or when a worker is killed.
"""
