"""Whether the Hugging Face Hub can be reached; if not, its libraries use their caches alone."""

from __future__ import annotations

import functools
import socket
import urllib.request
from urllib.parse import urlsplit

_TIMEOUT = 5.0  # seconds for a connection


@functools.cache
def check_hub() -> bool:
    """Whether the hub can be reached, asked once per process; if not, put the process into the hub's offline mode.

    Without it, `huggingface_hub` tries each file of a model six times, for half a minute and with a line on stderr each
    time, before it takes the file from its cache or reports that there is none.

    Behind a proxy nothing is asked, and the answer is yes.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in urllib.request.getproxies() or address.hostname is None:
        return True
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=_TIMEOUT).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
        return False
    return True
