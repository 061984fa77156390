"""The body of a request for a picture, and the answers to one that is wrong."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

_Text = Annotated[str, Field(max_length=4096)]
_Side = Annotated[int, Field(ge=8, le=8192)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class Asked(BaseModel):
    """Body of ``POST /generate``. What is left out is as the server's flags say, or the model's default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: _Text
    negative_prompt: _Text | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    height: _Side | None = None
    width: _Side | None = None
    num_frames: Annotated[int, Field(ge=1, le=1024)] | None = None
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance_scale: Annotated[_Number, Field(ge=0, le=100)] | None = None
    tolerance: _Number | None = None
    speedup: _Number | None = None

    def arguments(self) -> dict[str, Any]:
        """What is asked for, as the runner's arguments."""
        given = self.model_dump(exclude_none=True)
        return {**given, **{name: [given[name]] for name in ("prompt", "negative_prompt") if name in given}}


async def refuse_body(request: Request, error: RequestValidationError) -> Response:
    """Leaves out the values that were given, which FastAPI repeats: they may be long, or none that JSON has."""
    problems = [
        {"loc": [part if isinstance(part, int) else part[:64] for part in problem["loc"]], "msg": _message(problem)}
        for problem in error.errors()[:20]
    ]
    return JSONResponse({"detail": problems}, 422)


def _message(problem: dict[str, Any]) -> str:
    if problem["type"] == "extra_forbidden":
        return f"There is no such field: use {', '.join(Asked.model_fields)}"
    return str(problem["msg"])


def invalid(message: str) -> HTTPException:
    """The answer to a body that is wrong. The field is the one that the message names first, if it names one."""
    field = next((word for word in re.findall(r"\w+", message) if word in Asked.model_fields), None)
    return HTTPException(422, [{"loc": ["body", field] if field else ["body"], "msg": message}])
