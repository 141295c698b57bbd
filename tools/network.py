"""Whether the Hugging Face Hub can be reached. Imports the standard library only."""

import functools
import os
import socket
import urllib.parse
import urllib.request

SECONDS = 3  # that a connection may take


@functools.cache
def hub_answers() -> bool:
    """Whether the Hub, or the proxy before it, accepts a connection; one try of at most SECONDS.

    If not, HF_HUB_OFFLINE is set, so that the Hub's libraries, if they are imported later, take what is cached and
    give up at once. By themselves they try six times, for 25 seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxies = {} if urllib.request.proxy_bypass(address.hostname or "") else urllib.request.getproxies()
    if proxy := proxies.get(address.scheme) or proxies.get("all"):
        address = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname, port), timeout=SECONDS).close()
        return True
    except (OSError, ValueError, TypeError):  # an address may be nonsense
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False
