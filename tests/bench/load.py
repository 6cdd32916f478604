"""Load for a CONNECT proxy: runs on the host and, the same file, inside a sandbox. Stdlib only; prints one JSON line.

    python3 load.py PROXY_HOST PROXY_PORT AUTHORITY CONNECTIONS SECONDS

Each connection sends CONNECT, then a TLS ClientHello for the authority's name, and then ping-pongs 100 bytes with an
echo server behind the proxy. The ClientHello is there since Stockade lets nothing else through a `tls:` scope.
"""

import json
import socket
import ssl
import statistics
import sys
import threading
import time

PAYLOAD = b"x" * 100
TIMEOUT_SECONDS = 10


def client_hello(name: str) -> bytes:
    """Give the first bytes that a TLS client sends."""
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise RuntimeError("a handshake ended with nobody there")


def receive(sock: socket.socket, count: int) -> None:
    """Read exactly `count` bytes."""
    while count:
        data = sock.recv(min(count, 65536))
        if not data:
            raise ConnectionResetError("the proxy closed the connection")
        count -= len(data)


def connect(proxy: tuple[str, int], authority: str) -> socket.socket:
    """Open a tunnel, and see the ClientHello come back."""
    sock = socket.create_connection(proxy, timeout=TIMEOUT_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte:
            raise ConnectionResetError(f"refused: {head!r}")
        head += byte
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise ConnectionRefusedError(f"refused: {head + sock.recv(4096)!r}")
    hello = client_hello(authority.partition(":")[0])
    sock.sendall(hello)
    receive(sock, len(hello))
    return sock


def main() -> None:
    """Drive the load and print what was measured."""
    proxy = (sys.argv[1], int(sys.argv[2]))
    authority, count, seconds = sys.argv[3], int(sys.argv[4]), float(sys.argv[5])
    began = time.perf_counter()
    opened = [connect(proxy, authority) for _ in range(count)]
    connect_ms = (time.perf_counter() - began) * 1000 / count
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    def ping_pong(sock: socket.socket) -> None:
        mine = []
        now = time.perf_counter()
        while now < end:
            sock.sendall(PAYLOAD)
            receive(sock, len(PAYLOAD))
            then, now = now, time.perf_counter()
            mine.append(now - then)
        latencies.extend(mine)

    threads = [threading.Thread(target=ping_pong, args=(sock,)) for sock in opened]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(
        json.dumps(
            {
                "requests_per_second": len(latencies) / seconds,
                "median_us": statistics.median(latencies) * 1e6,
                "connect_ms": connect_ms,
            }
        )
    )


if __name__ == "__main__":
    main()
