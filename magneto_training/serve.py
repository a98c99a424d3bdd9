"""A server for one model, as Hugging Face's Inference Endpoints run it: python -m magneto_training.serve DIR"""

import asyncio
import base64
import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from .arguments import CommandParser, UsageError, UserError, user_errors_in_one_line

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse
    from starlette.datastructures import QueryParams
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    if __name__ != "__main__":
        raise
    with user_errors_in_one_line("serve"):
        raise UserError(f'the server needs the extra "serve": pip install -e ".[serve]" ({error})') from None

MAX_BODY_BYTES = 32 * 2**20  # the handler's largest photograph as base64 text, and room for the rest
MAX_REQUESTS = 40  # whose bodies are held at a time, one for each thread of Starlette's pool
MAX_BODY_SECONDS = 30  # for sending one, so that nobody keeps a place without a request

logger = logging.getLogger(__name__)


def load_handler(model_dir: str) -> Callable[[dict], list[dict]]:
    """The handler that lies beside a model, loaded as the endpoints load it.

    Raises:
        UserError: There is none, or the model cannot be loaded.
    """
    file = Path(model_dir) / "handler.py"
    if not file.is_file():
        raise UserError(f"{model_dir!r} holds no handler.py, expected a folder that train.py has written")
    spec = importlib.util.spec_from_file_location("handler", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["handler"] = module
    spec.loader.exec_module(module)
    try:
        return module.EndpointHandler(str(model_dir))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"the model {model_dir!r} cannot be loaded: {' '.join(str(error).split())}") from error


def create_app(handler: Callable[[dict], list[dict]]) -> FastAPI:
    """The routes: `POST /` for requests, `GET /health`.

    A body is JSON, `{"inputs": base64, "parameters": {...}}`, or an image with the parameters in the query string,
    where `candidate_labels` may stand several times.
    An error is `{"error": reason}` with status 400 (a bad request), 408 (a body that is too slow), 413 (one that is
    too large), 415 (neither JSON nor an image) or 500 (our own mistake). No more than `MAX_REQUESTS` are read and
    answered at a time; the others wait unread.

    Args:
        handler: Called from several threads at a time; raises `ValueError` for a bad request.
    """
    # No schema, and with it no /docs: the one would say nothing, the other fetches its scripts from elsewhere.
    app = FastAPI(openapi_url=None)
    places = asyncio.Semaphore(MAX_REQUESTS)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}  # not from the pool of threads, which may all be waiting for the model

    @app.post("/")
    async def answer(request: Request) -> JSONResponse:
        content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        async with places:
            try:
                async with asyncio.timeout(MAX_BODY_SECONDS):
                    body = await _read_body(request)
            except TimeoutError:
                raise HTTPException(408, f"the body took more than {MAX_BODY_SECONDS} seconds") from None
            except ClientDisconnect:
                return _error(400, "the client has left")  # whom this no longer reaches
            return await run_in_threadpool(_answer, handler, content_type, body, request.query_params)

    @app.exception_handler(HTTPException)
    def refuse(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, error.detail)

    return app


async def _read_body(request: Request) -> bytearray:
    reason = f"the body is too large, expected at most {MAX_BODY_BYTES} bytes"
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise HTTPException(413, reason)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, reason)
    return body


def _answer(handler: Callable, content_type: str, body: bytearray, query: QueryParams) -> JSONResponse:
    """In a thread of the pool."""
    try:
        return JSONResponse(handler(_read_request(content_type, body, query)))
    except ValueError as error:
        return _error(400, str(error))
    except HTTPException as error:
        return _error(error.status_code, error.detail)
    except Exception:
        logger.exception("a request has failed")
        return _error(500, "the server has failed at this request")


def _read_request(content_type: str, body: bytearray, query: QueryParams) -> Any:
    if content_type.startswith("image/"):  # as text, for the handler's checks of size and format
        return {"inputs": base64.b64encode(body).decode(), "parameters": _read_query(query)}
    if content_type != "application/json":
        raise HTTPException(415, f"the body is {content_type}, expected application/json or an image")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is no JSON") from None


def _read_query(query: QueryParams) -> dict[str, str]:
    """The parameters in a query string, of which some clients send a list of tags as one parameter for each."""
    for name in query:
        if name != "candidate_labels" and (times := len(query.getlist(name))) > 1:
            raise ValueError(f"{name[:80]!r} is in the query {times} times, expected once")
    labels = query.getlist("candidate_labels")
    return {**query, "candidate_labels": ",".join(labels)} if labels else dict(query)


def _error(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason}, status)


def main() -> None:
    parser = CommandParser("python -m magneto_training.serve", description=__doc__.partition(":")[0])
    parser.add_argument("model_dir", metavar="DIR", help="a trained folder")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at, by default this machine only")
    parser.add_argument("--port", type=int, default=8000, help="by default 8000")
    with user_errors_in_one_line("serve"):
        args = parser.parse_args()
        if not 0 <= args.port < 2**16:  # uvicorn would find out by a traceback, when the model is loaded
            raise UsageError(f"port is {args.port}, expected at most {2**16 - 1}, or 0 for any that is free")
        uvicorn.run(create_app(load_handler(args.model_dir)), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
