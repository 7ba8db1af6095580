"""Schemas of requests to /predict and of answers, for the OpenAPI description."""

from __future__ import annotations

from typing import Any

from fastgrad.checks import extra

with extra("serve"):
    from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """The answer to one input."""

    model_config = ConfigDict(extra="forbid")

    class_: int = Field(alias="class", ge=0)
    label: str | None
    probabilities: list[float]
    uncertainty: float = Field(description="the higher, the more rarely a clean input looks like this")
    risk: float | None = Field(description="probability that this answer is wrong; null if fitted without labels")
    reliable: bool | None = Field(description="whether the uncertainty is at most the threshold; null without one")
    accepted: bool | None = Field(description="whether the risk is at most the file's threshold; null without one")
    evidence: dict[str, float] | None = Field(
        description="evidence behind the uncertainty, -log p of each block by its name in /model; null if not exported"
    )
    alarm: str | None = Field(description="what two thirds of the evidence mean, in words; null unless not reliable")


class Refusal(BaseModel):
    """Why there is no answer."""

    detail: str


class Status(BaseModel):
    """Whether to send requests here."""

    ready: bool


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the refusals that a route may answer with, in addition to those of every route."""
    return {status: {"model": Refusal, "description": "Refused"} for status in statuses}


def request_body(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the request bodies that /predict takes, for inputs of this ``shape``."""
    image = {"type": "string", "format": "binary"}
    numbers = {"type": "array", "items": {}, "description": f"nested lists of numbers, shape {list(shape)}"}
    content: dict[str, Any] = {"image/*": {"schema": image}}
    for kind, name, schema in (("multipart/form-data", "file", image), ("application/json", "inputs", numbers)):
        content[kind] = {"schema": {"type": "object", "required": [name], "properties": {name: schema}}}
    return {"requestBody": {"required": True, "content": content}}
