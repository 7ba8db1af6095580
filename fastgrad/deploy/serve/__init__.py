"""The HTTP server's parts: requests, worker processes with batching, metrics, the application, its page.

Built on FastAPI and uvicorn. LitServe (0.2.19) was the first candidate, but it reads JSON and forms only,
ends on SIGTERM without finishing what it accepted, and answers the requests of a killed worker with an
error or not at all.
"""
