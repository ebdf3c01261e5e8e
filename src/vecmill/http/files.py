"""OpenAI's files: what batches read and what they give.

Source: https://platform.openai.com/docs/api-reference/files
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse

from vecmill.batches.files import StoredFile
from vecmill.batches.service import BatchService
from vecmill.batches.disk import in_thread
from vecmill.batches.disk import on_disk
from vecmill.batches.files import Upload
from vecmill.core.errors import InvalidInput, VecmillError
from vecmill.http.caller import ViewerOf
from vecmill.http.dialects.paging import After, page
from vecmill.http.errors import refused
from vecmill.http.in_progress import check_new_work
from vecmill.http.services import ServicesOf
from vecmill.http.upload_form import UploadForm

router = APIRouter(tags=["Batches"])

UPLOAD = "/v1/files"
PIECE_BYTES = 262_144
FORM_BYTES = 65_536  # of a form around its file, at most, so that it may be refused by its length
SHORTEST_LIFE, LONGEST_LIFE = 3600, 2_592_000  # seconds

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


@router.post(UPLOAD, summary="Upload a file", openapi_extra=FORM)
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
    files = await services.batches.all_files(viewer)
    chosen = [file for file in files if purpose is None or file.purpose == purpose]
    return page(chosen if order == "desc" else chosen[::-1], file_object, after, limit)


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


@router.delete("/v1/files/{file_id}", summary="Delete a file")
async def delete_file(file_id: FileId, services: ServicesOf, viewer: ViewerOf) -> dict[str, Any]:
    """A file that a batch still needs is kept: 409."""
    await services.batches.delete_file(file_id, viewer)
    return {"id": file_id, "object": "file", "deleted": True}
