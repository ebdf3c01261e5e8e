"""The command: its options, checked one by one, and the configuration that they make.

Whatever reaches a template is an address, a number or a plain path, so nothing in it can be read as a directive.

Sources: https://docs.haproxy.org/2.6/configuration.html, https://nginx.org/en/docs/dirindex.html
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit
from zlib import crc32

import typer
from jinja2 import Environment, PackageLoader, StrictUndefined

from vecmill import __version__
from vecmill.config.groups import BatchSettings, HttpSettings, SchedulerSettings
from vecmill.core.address import is_address
from vecmill.storage.files import write_atomically
from vecmill.tools.console import UsageError, messages, print_error

MARK = "# Written by `vecmill proxy-config` "
"""How each configuration begins: a file that does not is not overwritten."""
TEMPLATES = {"haproxy": "haproxy.cfg.jinja", "nginx": "nginx.conf.jinja"}
MOST_REPLICAS = 1000
MOST_CONNECTIONS = 1_000_000
LONGEST_URL = 300
LONGEST_NAME = 253
LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
PLAIN_PATH = re.compile(r"/[\w./+@-]*[\w+@-]", re.ASCII)
USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII)
# HAProxy puts a server on its ring by the lowest 20 bits of its number.
NUMBERS = 1_000_000

ANSWER_GRACE = 20
"""Seconds after REQUEST_TIMEOUT in which the server's own 504 comes."""
UPLOAD_GRACE = 65_536
"""Bytes of an upload's form beside its file."""
BULK_DIGITS, HELD_DIGITS = 4, 5
"""Bodies of embeddings with more digits to their size than the first are bulk; with more than the second they are not
held for another try. nginx can compare digits alone."""
HELD_BUFFER = 131_072
"""HAProxy's: bytes of a request, head and body, that can be sent again."""
IDLE_REUSE = 60
"""Seconds for which nginx keeps a connection to a server, which closes it after IDLE_TIMEOUT."""

BACKENDS = (
    (
        "vecmill_search",
        "Searches, and all else that any replica can answer: the one with the fewest requests.",
        ("balance leastconn", "retry-on conn-failure empty-response 503"),
    ),
    (
        "vecmill_job",
        "Bulk with X-Job-ID: one replica for each job, so that its cache stays warm.",
        (
            "balance hash var(txn.job)",
            "hash-type consistent wt6 avalanche",
            "retry-on conn-failure empty-response 503",
        ),
    ),
    (
        "vecmill_bulk",
        "Other bulk: one replica for each client, until it has a quarter more than its share.",
        (
            "balance hash var(txn.client)",
            "hash-type consistent wt6 avalanche",
            "hash-balance-factor 125",
            "retry-on conn-failure empty-response 503",
        ),
    ),
    (
        "vecmill_state",
        "Jobs, files, batches and what concerns one server: one replica for each owner; nothing is sent twice.",
        (
            "balance hash var(txn.owner)",
            "hash-type consistent wt6 avalanche",
            "http-reuse never",
            "retry-on conn-failure",
        ),
    ),
)

SAYS = {
    408: "the request did not arrive in time; send it again.",
    413: "the request body is larger than the proxy in front of the servers allows; split the request.",
    502: "the connection to the server broke before it had answered; temporarily, so try again.",
    503: "no server is ready; temporarily, so try again.",
    504: "the server has not answered in time; ask for less at once, or try again.",
}
TRY_AGAIN = (502, 503, 504)


def proxy_config(
    kind: Annotated[str, typer.Argument(help="`haproxy` or `nginx`.")] = "haproxy",
    replica: Annotated[
        list[str] | None,
        typer.Option("--replica", help="A server, as `http://HOST:PORT`; once for each.", show_default=False),
    ] = None,
    listen: Annotated[
        str, typer.Option(help="Where the proxy listens: `ADDRESS:PORT`, `[IPV6]:PORT`, or `*:PORT` for all.")
    ] = "127.0.0.1:8080",
    tls_certificate: Annotated[
        str | None,
        typer.Option(
            help="PEM file of the certificate and its chain: the proxy then speaks HTTPS.", show_default=False
        ),
    ] = None,
    tls_key: Annotated[
        str | None,
        typer.Option(
            help="PEM file of its private key. Left out, the key is in the certificate's file.", show_default=False
        ),
    ] = None,
    request_timeout: Annotated[float, typer.Option(help="The servers' REQUEST_TIMEOUT, in seconds.")] = (
        SchedulerSettings.model_fields["request_timeout"].default
    ),
    max_body_bytes: Annotated[int, typer.Option(help="The servers' MAX_BODY_BYTES.")] = (
        HttpSettings.model_fields["max_body_bytes"].default
    ),
    max_file_bytes: Annotated[int, typer.Option(help="The servers' MAX_FILE_BYTES.")] = (
        BatchSettings.model_fields["max_file_bytes"].default
    ),
    max_connections: Annotated[int, typer.Option(help="Connections of clients at a time.")] = 2000,
    run_as: Annotated[
        str | None,
        typer.Option(
            help="User that the proxy becomes when root starts it, or `none`. Default: `haproxy`, and nginx's own.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File to write. Default, and -: stdout.", show_default=False)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that this command has not written.")] = False,
) -> None:
    """Print a configuration of HAProxy or nginx for several servers.

    Searches go to the replica with the fewest requests, bulk by consistent hash of its job or client. Whoever drains or
    fails gets nothing. docs/proxies.md says what each part is for.

    Exit code 0: it is written; 2: an option is wrong.
    """
    try:
        options = Options(
            kind=_kind(kind),
            replicas=_replicas(kind, replica or []),
            listen=_listen(listen),
            certificate=_file("--tls-certificate", tls_certificate),
            certificate_key=_file("--tls-key", tls_key),
            request_seconds=round(_number("--request-timeout", request_timeout, 1, 86_400)),
            max_body_bytes=round(_number("--max-body-bytes", max_body_bytes, 1024, 1 << 40)),
            max_file_bytes=round(_number("--max-file-bytes", max_file_bytes, 1024, 1 << 50)),
            max_connections=round(_number("--max-connections", max_connections, 1, MOST_CONNECTIONS)),
            run_as=_user(kind, run_as),
        )
        options.check()
        _write(render(options), output, force=force)
    except UsageError as error:
        print_error(error)
        raise typer.Exit(error.exit_code) from None


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port."""

    host: str
    """A name in lower case, or an IP address in its shortest form, without brackets."""
    port: int
    tls: bool = False

    @property
    def name(self) -> str:
        """What HAProxy calls the server: it takes no brackets."""
        return f"{self.host}:{self.port}"

    @property
    def address(self) -> str:
        """As configurations write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else self.name


@dataclass(frozen=True, slots=True)
class ProxiedReplica(Address):
    """One server."""

    number: int = 0
    """Its own among all, made of its name: it keeps its place on HAProxy's ring when others come and go."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a configuration is made of, each part valid by itself."""

    kind: str
    replicas: Sequence[ProxiedReplica]
    listen: Address
    certificate: str | None
    certificate_key: str | None
    request_seconds: int
    max_body_bytes: int
    max_file_bytes: int
    max_connections: int
    run_as: str | None

    def check(self) -> None:
        """Refuse what does not go together.

        Raises:
            UsageError.
        """
        for replica in self.replicas:
            if replica.port == self.listen.port and _reaches(replica.host, self.listen.host):
                raise UsageError(
                    f"--replica {replica.name}: the proxy itself listens there (--listen {self.listen.address}); "
                    f"give one of the two another port."
                )
        if self.certificate_key and not self.certificate:
            raise UsageError("--tls-key without --tls-certificate: name the certificate that the key belongs to.")
        if self.kind == "haproxy" and self.certificate_key not in (None, self.certificate, f"{self.certificate}.key"):
            raise UsageError(
                f"--tls-key {self.certificate_key}: HAProxy reads the key from the certificate's own file or from "
                f"{self.certificate}.key; put it there."
            )
        if self.kind == "nginx" and any(replica.tls for replica in self.replicas):
            raise UsageError(
                "--replica https://...: nginx checks one certificate's name for all replicas; use haproxy, or http."
            )


def render(options: Options) -> str:
    """The configuration."""
    environment = Environment(  # noqa: S701  # no HTML
        loader=PackageLoader("vecmill.tools.proxy_config", "."), undefined=StrictUndefined, keep_trailing_newline=True
    )
    idle = HttpSettings.model_fields["idle_timeout"].default
    return environment.get_template(TEMPLATES[options.kind]).render(
        version=__version__,
        replicas=options.replicas,
        listen=_bound(options),
        certificate=options.certificate,
        certificate_key=options.certificate_key or options.certificate,
        request_seconds=options.request_seconds,
        answer_seconds=options.request_seconds + ANSWER_GRACE,
        head_seconds=HttpSettings.model_fields["head_timeout"].default,
        body_seconds=HttpSettings.model_fields["body_timeout"].default,
        idle_seconds=idle,
        reuse_seconds=IDLE_REUSE,
        max_body_bytes=options.max_body_bytes,
        max_upload_bytes=options.max_file_bytes + UPLOAD_GRACE,
        max_connections=options.max_connections,
        bulk_bytes=10**BULK_DIGITS,
        held_below=10**HELD_DIGITS,
        held_bytes=HELD_BUFFER if options.kind == "haproxy" else 10**HELD_DIGITS,
        small_digits=BULK_DIGITS,
        held_digits=HELD_DIGITS,
        run_as=options.run_as,
        backends=BACKENDS,
        errors=[(status, _error(status)) for status in SAYS],
        retry_after=TRY_AGAIN,
    )


def _error(status: int) -> str:
    """What the proxy itself answers, in the shape that most clients read."""
    message = f"{status}: {SAYS[status]}"
    kind = "server_error" if status in TRY_AGAIN else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return json.dumps({"error": error, "message": message, "detail": message}, separators=(",", ":"))


def _bound(options: Options) -> str:
    """The address as `bind` and `listen` take it; of `*` both families, where there are both."""
    if options.listen.host != "*":
        return options.listen.address
    port = options.listen.port
    return f":::{port} v4v6" if options.kind == "haproxy" else f"[::]:{port} ipv6only=off"


def _kind(kind: str) -> str:
    if kind not in TEMPLATES:
        raise UsageError(f"{kind!r}: must be {' or '.join(TEMPLATES)}.")
    return kind


def _replicas(kind: str, urls: Sequence[str]) -> list[ProxiedReplica]:
    if not urls:
        raise UsageError(
            f"no --replica: name each server, as in `vecmill proxy-config {kind} --replica http://a:8080`."
        )
    if len(urls) > MOST_REPLICAS:
        raise UsageError(f"{len(urls)} times --replica: at most {MOST_REPLICAS} are written into one configuration.")
    addresses: dict[str, Address] = {}
    for url in urls:
        address = _replica(url)
        if address.name in addresses:
            raise UsageError(f"--replica {_shown(url)}: {address.name} is named twice.")
        addresses[address.name] = address
    taken: set[int] = set()
    replicas = []
    for name, address in addresses.items():
        number = crc32(name.encode()) % NUMBERS + 1
        while number in taken:
            number = number % NUMBERS + 1
        taken.add(number)
        replicas.append(ProxiedReplica(address.host, address.port, address.tls, number))
    return replicas


def _replica(url: str) -> Address:
    """Of `http://host:port`.

    Raises:
        UsageError: it is anything else.
    """
    wrong = f"--replica {_shown(url)}: "
    if len(url) > LONGEST_URL or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise UsageError(f"{wrong}must be an address of the form http://HOST:PORT, in ASCII and without spaces.")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{wrong}must be an address of the form http://HOST:PORT ({error}).") from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"{wrong}must be an address of the form http://HOST:PORT.")
    if "@" in parts.netloc:
        raise UsageError(f"{wrong}must have no user or password; clients send their own API keys.")
    if parts.path not in ("", "/") or "?" in url or "#" in url:
        raise UsageError(f"{wrong}must end after the port: the servers' paths are passed on as they are.")
    if port is None and parts.netloc.endswith(":"):
        raise UsageError(f"{wrong}has no port after the colon.")
    host = _host(host, wrong)
    if host in ("0.0.0.0", "::"):  # noqa: S104  # it is refused
        raise UsageError(f"{wrong}is no address of one server; name the one that it is reached by.")
    tls = parts.scheme == "https"
    return Address(host, _port(port if port is not None else 443 if tls else 80, wrong), tls)


def _host(host: str, wrong: str) -> str:
    """A name or an address, in the form in which equal ones are equal."""
    if "%" in host:
        raise UsageError(
            f"{wrong}has an IPv6 address with a zone (`%`), which proxies do not take; use another address."
        )
    try:
        address: IPv4Address | IPv6Address = ip_address(host)
    except ValueError:
        labels = host.removesuffix(".").split(".")
        looks_numeric = labels[-1].isdecimal()
        if len(host) > LONGEST_NAME or looks_numeric or not all(map(LABEL.fullmatch, labels)):
            raise UsageError(f"{wrong}has no valid host name or IP address.") from None
        return ".".join(labels)
    return str(address)


def _port(port: int, wrong: str) -> int:
    if not 1 <= port <= 65_535:
        raise UsageError(f"{wrong}the port must be from 1 to 65535.")
    return port


def _listen(text: str) -> Address:
    """Of `address:port`, or `*:port`.

    Raises:
        UsageError: it is anything else.
    """
    wrong = f"--listen {_shown(text)}: "
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdecimal()):
        raise UsageError(f"{wrong}must be ADDRESS:PORT, [IPV6]:PORT or *:PORT.")
    number = _port(int(port[:6]), wrong)
    if host == "*":
        return Address(host, number)
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        address = ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        raise UsageError(f"{wrong}must be an IP address of this machine, or *, before the port.") from None
    if bracketed != (address.version == 6) or "%" in host:
        raise UsageError(f"{wrong}must be ADDRESS:PORT, [IPV6]:PORT or *:PORT.")
    return Address(str(address), number)


def _reaches(host: str, listen: str) -> bool:
    """Whether a host is the address that the proxy binds, as far as can be told without asking a name server."""
    loopback = host == "localhost" or (is_address(host) and ip_address(host).is_loopback)
    if listen in ("*", "0.0.0.0", "::"):  # noqa: S104
        return loopback
    return host == listen or (host == "localhost" and ip_address(listen).is_loopback)


def _file(option: str, path: str | None) -> str | None:
    if path is not None and not PLAIN_PATH.fullmatch(path):
        raise UsageError(
            f"{option} {_shown(path)}: must be an absolute path of letters, digits and any of ._/+@-, without spaces."
        )
    return path


def _number(option: str, value: float, least: int, most: int) -> float:
    if not least <= value <= most:
        raise UsageError(f"{option} {value:g}: must be from {least} to {most}.")
    return value


def _user(kind: str, name: str | None) -> str | None:
    if name is None:
        return "haproxy" if kind == "haproxy" else None
    if not USER.fullmatch(name):
        raise UsageError(f"--run-as {_shown(name)}: must be the name of a user of this system, or none.")
    return None if name == "none" else name


def _shown(text: str) -> str:
    """What was given, short enough for a sentence; quoted where it is not plain."""
    short = text if len(text) <= LONGEST_URL else f"{text[:LONGEST_URL]}..."
    plain = short.isascii() and short.isprintable() and " " not in short and short
    return short if plain else repr(short)


def _write(text: str, output: str | None, *, force: bool) -> None:
    if output is None or output == "-":
        sys.stdout.write(text)
        return
    path = Path(output).expanduser()
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"--output {_shown(output)}: is no file; leave it out for stdout.")
        if path.exists() and not force and not _is_ours(path):
            raise UsageError(
                f"--output {_shown(output)}: is there already, and not written by this command; --force overwrites it."
            )
        write_atomically(path, text.encode())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"--output {_shown(output)}: cannot be written ({reason}).") from None
    messages.print(f"written to {path}")


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()
