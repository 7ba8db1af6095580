"""The HTTP server's parts: requests, worker processes with batching, metrics, the application, its page.

Built on FastAPI and uvicorn: LitServe (0.2.19) does not finish what it accepted, at SIGTERM or for a killed worker.
"""
