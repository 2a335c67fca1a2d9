"""The images of a request: data URIs, and addresses of hosts that the server's owner named.

An address is parsed once, its host looked up once, and the connection goes to what was found: an
address that is not on the open internet is refused, so that no caller reaches what only this
machine can. Redirects are refused, too, and proxies are not used.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from urllib.parse import SplitResult, urlsplit

from ..graphs.fields import show
from .errors import RequestError
from .requests import ImageAddress

FETCH_SECONDS = 10
"""In which an image has to be here, whole."""

CHUNK_BYTES = 1 << 16

NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Addresses that stand for those of IPv4 in their last 32 bits."""

PORTS = {"http": 80, "https": 443}


def is_public(text: str) -> bool:
    """Return whether an IP address is one of the open internet, through whatever it is wrapped."""
    address = ipaddress.ip_address(text.partition("%")[0])
    inner = None
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None,))[-1]
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return is_public(str(inner))
    return address.is_global and not address.is_multicast


def image_bytes(image: ImageAddress, allowed: Collection[str], most: int) -> bytes:
    """Return an image's file, of at most ``most`` bytes.

    Raises:
        RequestError: the address cannot be used, or what is there not be fetched.
    """
    if image.url[:5].lower() == "data:":
        return _from_data_uri(image)
    return _fetched(image, _checked(image, allowed), most)


def _from_data_uri(image: ImageAddress) -> bytes:
    head, _, data = image.url[5:].partition(",")
    kind, *options = head.lower().split(";")
    if options[-1:] != ["base64"]:
        raise RequestError(
            "expected data:image/png;base64,... and found another kind of data URI",
            422,
            "invalid_image_url",
            image.param,
        )
    if kind and not kind.startswith("image/"):
        text = f"expected an image, found {show(kind)}"
        raise RequestError(text, 415, "unsupported_image", image.param)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        text = "the data URI is not base64, or was cut short. Encode the whole file"
        raise RequestError(text, 422, "invalid_image", image.param) from None


def _checked(image: ImageAddress, allowed: Collection[str]) -> SplitResult:
    """Return the parts of an address, if its host is on the list.

    Raises:
        RequestError: it is not, or parsers might disagree about what it means.
    """
    url = image.url
    plain = url.isascii() and url.isprintable() and not set(url) & set(' \\"<>^`{|}')
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        plain = False
    if not plain or parts.scheme not in PORTS or not host or "@" in parts.netloc:
        raise RequestError(
            f"{show(url)} is no address of an image; expected a data URI, or http(s)://HOST/PATH",
            422,
            "invalid_image_url",
            image.param,
        )
    names = {f"{host}:{port or PORTS[parts.scheme]}"} | ({host} if port is None else set())
    if not names & set(allowed):
        raise RequestError(
            f"images are not fetched from {show(host)}. Send the image itself, as a data URI; or "
            "start the server with --allow-images-from HOST",
            422,
            "image_host_not_allowed",
            image.param,
        )
    return parts


def _fetched(image: ImageAddress, parts: SplitResult, most: int) -> bytes:
    host = parts.hostname or ""
    deadline = time.monotonic() + FETCH_SECONDS
    connection = http.client.HTTPConnection(host, parts.port or PORTS[parts.scheme])
    try:
        connection.sock = _connect(host, connection.port, parts.scheme == "https")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"accept": "image/*"})
        response = connection.getresponse()
        if response.status != 200:
            moved = " (a redirect, which is not followed)" if 300 <= response.status < 400 else ""
            raise _not_fetched(f"{host} answered {response.status}{moved}")
        data = bytearray()
        while chunk := response.read1(CHUNK_BYTES):
            data += chunk
            if len(data) > most:
                text = f"the image at {host} has more than {most} bytes (--max-body)"
                raise RequestError(text, 413, "image_too_large", image.param)
            if time.monotonic() > deadline:
                raise TimeoutError
        return bytes(data)
    except TimeoutError:
        raise _not_fetched(f"{host} took longer than {FETCH_SECONDS} s", image.param) from None
    except (OSError, http.client.HTTPException, ValueError):
        raise _not_fetched(f"{host} cannot be asked", image.param) from None
    except RequestError as error:
        error.param = image.param
        raise
    finally:
        connection.close()


def _connect(host: str, port: int, encrypted: bool) -> socket.socket:
    """Connect to a host, to an address that was looked at.

    Raises:
        RequestError: it has one that is not of the open internet.
        OSError: it has none, or cannot be reached.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not all(is_public(str(entry[4][0])) for entry in found):
        raise _not_fetched(f"{host} is at an address that is not public")
    connected = socket.create_connection((str(found[0][4][0]), port), FETCH_SECONDS)
    if not encrypted:
        return connected
    try:
        return ssl.create_default_context().wrap_socket(connected, server_hostname=host)
    except BaseException:
        connected.close()
        raise


def _not_fetched(why: str, param: str | None = None) -> RequestError:
    text = f"the image was not fetched: {why}. Send it as a data URI"
    return RequestError(text, 422, "image_not_fetched", param)
