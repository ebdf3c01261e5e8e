"""A multipart form with one file, read as it comes: the file's bytes go on at once, the fields are kept.

Source: https://datatracker.ietf.org/doc/html/rfc7578
"""

from __future__ import annotations

from collections.abc import Callable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vecmill.core.errors import InvalidInput, MalformedBody

MOST_FIELDS = 64
LONGEST_FIELD = 4096  # bytes
LONGEST_NAME = 255  # characters


class UploadForm:
    """For any thread, one at a time."""

    def __init__(self, content_type: str, write: Callable[[bytes], None]) -> None:
        """`write` is given the bytes of the part called `file`, as long as there are any.

        Raises:
            MalformedBody: it is no multipart form.
        """
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise MalformedBody(
                "The request body must be a form with the file and its purpose, sent as multipart/form-data: "
                "curl -F purpose=batch -F file=@input.jsonl."
            )
        self._write = write
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._field: bytearray | None = None
        self._name = ""
        self._complete = False
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """None while no file has come."""
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise MalformedBody(f"The form cannot be read: {error}.") from None

    def feed(self, data: bytes) -> None:
        """Read on.

        Raises:
            MalformedBody, InvalidInput: this is no such form. Whatever `write` raises.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise MalformedBody(f"The form cannot be read: {error}.") from None

    def finish(self) -> str:
        """The file's name, once all has been read.

        Raises:
            MalformedBody, InvalidInput: something is missing.
        """
        if not self._complete:
            raise MalformedBody("The form ends before its last boundary: not all of it has arrived.")
        if self.filename is None:
            raise InvalidInput("`file` is missing from the form.", param="file")
        return self.filename

    def _on_part_begin(self) -> None:
        self._disposition = b""
        self._field = None

    def _on_header_end(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name != "file":
            self._field = bytearray()
        elif self.filename is None:
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")[:LONGEST_NAME] or "file"
        else:
            raise InvalidInput("`file` is there twice; upload one file at a time.", param="file")
        if len(self.fields) >= MOST_FIELDS:
            raise MalformedBody(f"The form has more than {MOST_FIELDS} fields.")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._write(data[start:end])
        elif len(self._field) + end - start > LONGEST_FIELD:
            raise InvalidInput(f"`{self._name[:100]}` is longer than {LONGEST_FIELD} bytes.", param=self._name[:100])
        else:
            self._field.extend(data[start:end])

    def _on_part_end(self) -> None:
        if self._field is not None:
            self.fields[self._name] = self._field.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._complete = True
