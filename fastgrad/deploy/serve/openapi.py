"""The part of the OpenAPI description that cannot be read off a signature."""

from __future__ import annotations

from typing import Any


def operation(shape: tuple[int, ...]) -> dict[str, Any]:
    """What /predict takes and gives, for inputs of this ``shape``."""
    image = {"schema": {"type": "string", "format": "binary"}}
    number_list = {
        "type": "array",
        "items": {},
        "description": f"nested lists of numbers, shape {list(shape)}",
    }
    error = {
        "description": "Refused; `detail` says why",
        "content": {
            "application/json": {"schema": {"type": "object", "properties": {"detail": {"type": "string"}}}}
        },
    }
    result = {
        "type": "object",
        "required": ["class", "label", "probabilities", "uncertainty", "reliable", "evidence", "alarm"],
        "properties": {
            "class": {"type": "integer"},
            "label": {"type": ["string", "null"]},
            "probabilities": {"type": "array", "items": {"type": "number"}},
            "uncertainty": {"type": "number", "description": "higher = less reliable"},
            "reliable": {"type": ["boolean", "null"], "description": "uncertainty at most the threshold"},
            "evidence": {
                "type": ["object", "null"],
                "additionalProperties": {"type": "number", "minimum": 0},
                "description": "what the uncertainty rests on: by name as in /model, each block's -log p as the "
                "detector sums it; null where the file does not give it",
            },
            "alarm": {
                "type": ["string", "null"],
                "description": "in words, what two thirds of the evidence mean; null unless reliable is false and "
                "there is evidence",
            },
        },
    }
    return {
        "requestBody": {
            "required": True,
            "content": {
                "image/*": image,
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["file"],
                        "properties": {"file": image["schema"]},
                    }
                },
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["inputs"],
                        "properties": {"inputs": number_list},
                    }
                },
            },
        },
        "responses": {
            "200": {"description": "The answer", "content": {"application/json": {"schema": result}}},
            **dict.fromkeys(("400", "401", "408", "413", "415", "422", "500", "503", "504"), error),
        },
    }
