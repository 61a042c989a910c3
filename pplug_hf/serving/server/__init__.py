"""The parts of the server, which need the extra `serve`."""

from ...optional import require

for _module in ("fastapi", "uvicorn", "prometheus_client"):
    require(_module, "serve", "The server")
