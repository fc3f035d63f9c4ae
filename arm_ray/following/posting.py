"""Posts to addresses that a configuration names, and to no others.

A hook's address may be on this machine or in a private network: engines that load a new model are
there. But no answer may send the request elsewhere, so that redirects are not followed; and
link-local addresses are refused, at which clouds hand out a machine's credentials. What counts is
the address that the connection was made to, whatever name it had.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

_VARIABLE = re.compile(r"\$\$\{|\$\{(\w+)\}")
# Where clouds answer beside 169.254.0.0/16 and fe80::/10: AWS and Google by IPv6, Alibaba, Azure,
# Oracle, and Google by name.
_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        (
            *("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "100.100.100.200"),
            *("168.63.129.16", "192.0.0.192"),
        ),
    )
)
_METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "metadata.goog"})
# IPv6 addresses whose last 32 bits are one of IPv4: translated, and of old tunnels.
_WITH_IPV4 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/96", "::/96")))
_MOST_READ = 4096


def with_variables(text: str, others: Mapping[str, str], used: dict[str, str]) -> str:
    """A text with the values of environment variables in place of `${NAME}`; `$${` stands for `${`.

    Args:
        text: The text.
        others: Further variables, which take precedence.
        used: Is given the name and value of each that was put in.

    Raises:
        ValueError: There is no such variable.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name is None:
            return "${"
        found = others.get(name, os.environ.get(name))
        if found is None:
            raise ValueError(f"the environment has no {name}; `$${{` stands for `${{`")
        used[name] = found
        return found

    return _VARIABLE.sub(value, text)


def refusal(url: str) -> str | None:
    """Why nothing is posted to an address, as far as its text tells; None: it may be.

    Args:
        url: The address; `${NAME}` in it is taken as it is.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, _port = parts.hostname or "", parts.port
    except ValueError as error:
        return f"not an http address: {error}"
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        return "not an http address"
    if "@" in parts.netloc:
        return "it carries a user and password; write ${NAME} in its path or query"
    if host.rstrip(".").lower() in _METADATA_NAMES or _is_refused(_literal(host)):
        return "a link-local address: the machine's own credentials are there"
    return None


def _literal(host: str) -> str | None:
    """The address that a host's text is one of, in any of the forms that are connected to."""
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        # Also 2852039166 and 0251.0376.0251.0376.
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None


def _is_refused(address: str | None) -> bool:
    if address is None:
        return False
    found = _meant(ipaddress.ip_address(address.partition("%")[0]))
    return found.is_link_local or found in _METADATA


def _meant(
    found: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address of IPv4 that one of IPv6 stands for, where it stands for one."""
    if isinstance(found, ipaddress.IPv4Address):
        return found
    last = int(found) & 0xFFFFFFFF
    # `::1` and the like are themselves.
    if last > 0xFFFF and any(found in network for network in _WITH_IPV4):
        return ipaddress.IPv4Address(last)
    return found.ipv4_mapped or found.sixtofour or found


class _Http(http.client.HTTPConnection):
    """A connection that ends before anything is sent where it has led to a refused address."""

    def connect(self) -> None:
        super().connect()
        if _is_refused(self.sock.getpeername()[0]):
            self.sock.close()
            raise OSError("the name leads to a link-local address, to which nothing is sent")


class _Https(http.client.HTTPSConnection, _Http):
    """The same: what is above it connects, and then it begins to speak TLS."""


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_Http, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_Https, req)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def post(url: str, text: str, timeout_s: float) -> tuple[int, str, str]:
    """Post JSON to an address; see the module.

    Args:
        url: The address.
        text: The JSON.
        timeout_s: Seconds for each step of it.

    Returns:
        Status, its reason, and the beginning of the answer, of a redirect where to.

    Raises:
        OSError: There is no answer.
        ValueError: It is no address.
        HTTPException: The answer is none of HTTP.
    """
    request = urllib.request.Request(  # noqa: S310 -- `refusal` has looked at the scheme
        url, text.encode(), {"Content-Type": "application/json"}, method="POST"
    )
    opener = urllib.request.build_opener(_HttpHandler, _HttpsHandler, _NoRedirects)
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            return int(answer.status), str(answer.reason), ""
    except urllib.error.HTTPError as error:
        said = ""
        if 300 <= error.code < 400:
            said = f"a redirect to {error.headers.get('Location')}, which is not followed"
        else:
            try:
                said = error.read(_MOST_READ).decode(errors="replace")
            except (OSError, http.client.HTTPException):
                said = ""
        error.close()
        return error.code, str(error.reason), said
