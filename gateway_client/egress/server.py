"""The egress worker process: `python -I -m gateway_client.egress.server --user NAME`, daemon on fd 3, dialer on fd 4.

Imports everything it will ever need, gives up everything it can, says it is ready, and serves until it is killed. If
the daemon goes, it goes on answering 503: an agent then sees a clear refusal and nothing leaves unrecorded.
"""

from __future__ import annotations

import argparse
import encodings.idna  # noqa: F401 - looked up by name at run time, when nothing can be opened any more
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

import uvloop

from gateway_client.egress.confine import STEADY, Confinement, confine, forbid_io_uring
from gateway_client.egress.leaves import warm_up
from gateway_client.egress.terminate import ANY_HTTP, ONLY_HTTP11
from gateway_client.egress.worker import Worker
from gateway_client.gateways import prices
from gateway_client.gateways.adapters import ADAPTERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.egress.messages import HttpVersion

DAEMON_FD: Final = 3
DIALER_FD: Final = 4
open_files_max: Final = 262_144
"""Where the hard limit allows it: two descriptors for each of 256 connections of 500 agents."""
CA_FILES: Final = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


def tls_context(more: Path | None, offered: Sequence[HttpVersion]) -> ssl.SSLContext:
    """Give a verifying context with the host's authorities and `more` read in: later no file can be opened."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(offered)
    for name in CA_FILES:
        if Path(name).is_file():
            context.load_verify_locations(cafile=name)
            break
    if more is not None:
        context.load_verify_locations(cafile=more)
    return context


async def serve(user: str, ca_file: Path | None) -> None:
    warm_up()
    confinement = Confinement(user=user, system_calls=STEADY, own_network=True, open_files_max=open_files_max)
    worker = Worker(
        socket.socket(fileno=DAEMON_FD),
        socket.socket(fileno=DIALER_FD),
        tls=tls_context(ca_file, ONLY_HTTP11),
        tls_http2=tls_context(ca_file, ANY_HTTP),
        adapters=ADAPTERS,
        prices=prices.load(),
        descriptors_max=confinement.open_files_max,
    )
    posture = confine(confinement)
    worker.ready(posture)
    await worker.over.wait()
    os._exit(0)  # an orderly end of the loop opens sockets, which the filter refuses


def main() -> int:
    parser = argparse.ArgumentParser(prog="gateway_client.egress.server")
    parser.add_argument("--user", required=True)
    parser.add_argument("--ca-file", type=Path, help="authorities beside the host's that upstream is verified with")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is the daemon's to act on
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="egress worker: %(message)s")
    traceback.format_exc()  # imports what it needs
    forbid_io_uring()
    os.closerange(DIALER_FD + 1, 1 << 20)
    gc.freeze()
    try:
        uvloop.run(serve(arguments.user, arguments.ca_file))
    except OSError as error:
        sys.stderr.write(f"egress worker: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
