"""The server on loopback that fails as real ones do."""

from tests.faulty_server import dead_url, server

__all__ = ["dead_url", "server"]
