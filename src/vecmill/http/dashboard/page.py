"""The dashboard's files, as HTTP answers.

Knows where the files lie, their media types and what a browser may do with them. Does not know what
the page shows: its scripts ask the server's routes like any other client, so nothing here touches the
model, the queue or the jobs.
"""

import re
from importlib.resources import files
from pathlib import PurePath

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

# The page shows text that clients chose. It is only ever inserted as text; should that fail one day,
# this policy still lets nothing run or load that this service did not ship.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # After an upgrade a page must not meet the scripts of the release before.
    "Cache-Control": "no-cache",
}

MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript"}

# Comments, with the types in them, and blanks, which are a third of our own files: a browser needs neither.
COMMENTS = re.compile(rb"(?<!\S)//[^\n]*|/\*.*?\*/|<!--.*?-->", re.DOTALL)
BLANKS = re.compile(rb"^\s+|[ \t]+$", re.MULTILINE)


# In a style sheet also those around punctuation; not the one before a colon, which selects what is below an element.
AROUND = re.compile(rb"\s*([{};,])\s*|(?<=:)[ ]")


def _short(file: bytes, name: str = "") -> bytes:
    short = BLANKS.sub(b"", COMMENTS.sub(b"", file))
    return AROUND.sub(rb"\1", short).replace(b";}", b"}") if name.endswith(".css") else short


_HERE = files(__package__)
_PAGE = _short(_HERE.joinpath("index.html").read_bytes())
# Read once: a request can only ever choose among these.
_STATIC = {
    file.name: _short(file.read_bytes(), file.name) if folder is _HERE else file.read_bytes()
    for folder in (_HERE, _HERE.joinpath("vendor"))
    for file in folder.iterdir()
    if PurePath(file.name).suffix in MEDIA_TYPES
}

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"], response_class=HTMLResponse)  # Ollama's clients look with HEAD
async def page() -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=HEADERS)


@router.get("/dashboard")
async def elsewhere(request: Request) -> RedirectResponse:
    """Where people look for the page. It is served at one address only, to which the links in it are relative."""
    return RedirectResponse(request.state.way_to_root)


@router.get("/static/{name}")
async def static(name: str) -> Response:
    if name not in _STATIC:
        raise HTTPException(404)
    return Response(_STATIC[name], media_type=MEDIA_TYPES[PurePath(name).suffix], headers=HEADERS)
