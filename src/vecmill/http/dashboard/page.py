"""The dashboard's three files, as HTTP answers.

Knows where the files lie, their media types and what a browser may do with them. Does not know what
the page shows: its script reads `/stats`, `/jobs` and `/health` like any other client, so nothing here
touches the model, the queue or the jobs.
"""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

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
    # After an upgrade a page must not meet the script of the release before.
    "Cache-Control": "no-cache",
}

_HERE = files(__package__)
_PAGE = _HERE.joinpath("index.html").read_bytes()
_SCRIPT = _HERE.joinpath("dashboard.js").read_bytes()
_STYLE = _HERE.joinpath("dashboard.css").read_bytes()

router = APIRouter(include_in_schema=False)


@router.get("/", response_class=HTMLResponse)
async def page() -> HTMLResponse:
    return HTMLResponse(_PAGE, headers=HEADERS)


@router.get("/static/dashboard.js")
async def script() -> Response:
    return Response(_SCRIPT, media_type="text/javascript", headers=HEADERS)


@router.get("/static/dashboard.css")
async def style() -> Response:
    return Response(_STYLE, media_type="text/css", headers=HEADERS)
