"""OpenAI's files: what batches read and what they give. An upload goes to the disk as it comes.

Source: https://platform.openai.com/docs/api-reference/files; https://datatracker.ietf.org/doc/html/rfc7578
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vecmill.batches.disk import in_thread, on_disk
from vecmill.batches.files import StoredFile, Upload
from vecmill.batches.service import BatchService
from vecmill.core.errors import InvalidInput, MalformedBody, VecmillError
from vecmill.http.errors import documented, refused
from vecmill.http.route import ViewerOf, check_new_work
from vecmill.http.services import ServicesOf

router = APIRouter(tags=["Batches"], responses=documented(503))

UPLOAD = "/v1/files"
PIECE_BYTES = 262_144
FORM_BYTES = 65_536  # of a form around its file, at most, so that it may be refused by its length
SHORTEST_LIFE, LONGEST_LIFE = 3600, 2_592_000  # seconds
MOST_FIELDS = 64  # of a form
LONGEST_FIELD = 4096  # bytes
LONGEST_NAME = 255  # characters

FileId = Annotated[str, Path(description="The `id` that POST /v1/files answered with, or a batch's output or errors.")]
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "file": {"type": "string", "format": "binary", "description": "JSONL: a request on each line."},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": SHORTEST_LIFE,
                            "maximum": LONGEST_LIFE,
                            "description": "Default: FILE_EXPIRES_DAYS.",
                        },
                    },
                }
            }
        },
    }
}

After = Annotated[str | None, Query(description="The id after which the page begins: the last of the page before.")]


def place_after(ids: Sequence[str], after: str | None) -> int:
    """Where a page of the list of these ids begins.

    Raises:
        InvalidInput: there is no such id.
    """
    if not after:  # empty is from the beginning: some clients send it
        return 0
    try:
        return ids.index(after) + 1
    except ValueError:
        raise InvalidInput("`after` is no id of this list.", param="after") from None


def listed(shown: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """OpenAI's object for a page of a list."""
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": has_more,
    }


class UploadForm:
    """A multipart form with one file, read as it arrives: the file's bytes are passed on, the fields are kept.

    For one thread at a time.
    """

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
        self._begun = False
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
        if not self._begun:  # behind line ends the parser looks for a boundary, but no further than to the piece's end
            data = data.lstrip(b"\r\n")
            self._begun = bool(data)
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


class FileContent(FileResponse):
    """A file as it lies on the disk: bytes to be kept, whatever a client has named it and whatever is in it.

    A browser that took it for a page would run what is in it with the rights of this server's own pages.
    """

    media_type = "application/octet-stream"
    chunk_size = PIECE_BYTES


def file_object(file: StoredFile) -> dict[str, Any]:
    """OpenAI's object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "expires_at": int(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


@router.post(UPLOAD, summary="Upload a file", openapi_extra=FORM, responses=documented(507))
async def upload_file(request: Request, services: ServicesOf) -> Response:
    """Keep the input of a batch. It goes to the disk as it comes; what breaks off leaves nothing."""
    try:
        check_new_work(request)
        return Response(await _uploaded(request, services.batches), media_type="application/json")
    except VecmillError as error:
        response = await refused(request, error)
        # The rest of the body is not read, so the connection cannot carry another request.
        response.headers["Connection"] = "close"
        return response


async def _uploaded(request: Request, batches: BatchService) -> bytes:
    declared = request.headers.get("content-length", "")
    upload = await batches.upload(
        max(0, int(declared) - FORM_BYTES) if declared.isdecimal() else 0, request.state.viewer
    )
    try:
        file = await _received(request, upload)
    finally:
        await in_thread(upload.discard)
    return orjson.dumps(file_object(file))


async def _received(request: Request, upload: Upload) -> StoredFile:
    form = UploadForm(request.headers.get("content-type", ""), upload.write)
    pieces, size = [], 0
    async for piece in request.stream():
        pieces.append(piece)
        size += len(piece)
        if size >= PIECE_BYTES:
            await on_disk(form.feed, b"".join(pieces))
            _check_purpose(form.fields.get("purpose", "batch"))
            pieces, size = [], 0
    await on_disk(form.feed, b"".join(pieces))
    name = form.finish()
    _check_purpose(form.fields.get("purpose"))
    return await on_disk(upload.finish, name, _life(form.fields))


def _check_purpose(purpose: str | None) -> None:
    if purpose != "batch":
        raise InvalidInput(
            "`purpose` must be `batch`: files are kept here as the input of batches and for nothing else.",
            param="purpose",
        )


def _life(fields: dict[str, str]) -> float | None:
    """Seconds until the file expires; None: the server's default."""
    seconds = fields.get("expires_after[seconds]")
    if fields.get("expires_after[anchor]", "created_at") != "created_at":
        raise InvalidInput("`expires_after[anchor]` must be `created_at`.", param="expires_after[anchor]")
    if seconds is None:
        return None
    usable = seconds.isascii() and seconds.isdecimal() and len(seconds) < 10
    if not usable or not SHORTEST_LIFE <= int(seconds) <= LONGEST_LIFE:
        raise InvalidInput(
            f"`expires_after[seconds]` must be a whole number from {SHORTEST_LIFE} to {LONGEST_LIFE}.",
            param="expires_after[seconds]",
        )
    return float(seconds)


@router.get(UPLOAD, summary="List files")
async def list_files(
    services: ServicesOf,
    viewer: ViewerOf,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="By `created_at`; the newest first: `desc`.")] = "desc",
    purpose: Annotated[str | None, Query(description="`batch`: uploads; `batch_output`: what batches gave.")] = None,
) -> dict[str, Any]:
    """Uploads and what batches gave."""
    ids = await services.batches.file_ids(viewer, purpose)
    if order == "asc":
        ids.reverse()
    start = place_after(ids, after)
    files = await services.batches.files(ids[start : start + limit], viewer)
    return listed([file_object(file) for file in files], has_more=start + limit < len(ids))


@router.get("/v1/files/{file_id}", summary="Get a file's description")
async def get_file(file_id: FileId, services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """Its name, size and purpose."""
    return file_object(await services.batches.file(file_id, viewer))


@router.get("/v1/files/{file_id}/content", summary="Get a file's content", response_class=FileContent)
async def get_content(file_id: FileId, services: ServicesOf, viewer: ViewerOf) -> Response:
    """The bytes themselves, from the disk as they are sent."""
    file = await services.batches.file(file_id, viewer)
    return FileContent(
        services.batches.path_of(file_id),
        media_type=FileContent.media_type,  # not what its name would make of it
        filename=file.filename,
        headers={"X-Content-Type-Options": "nosniff"},
    )


@router.delete("/v1/files/{file_id}", summary="Delete a file", responses=documented(409))
async def delete_file(file_id: FileId, services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """A file that a batch still needs is kept: 409."""
    await services.batches.delete_file(file_id, viewer)
    return {"id": file_id, "object": "file", "deleted": True}
