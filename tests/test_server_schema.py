"""Requests made of the OpenAPI document: none gets a 5xx, or an answer that is not in it."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from serving import PATIENCE, Running, running

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_nothing_surprises(server: Running, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tested = 0
    negative = mode == GenerationMode.NEGATIVE
    for result in schema.get_all_operations():
        operation = result.ok()
        if negative and not operation.body:
            continue  # nothing that could be of another shape

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=100, suppress_health_check=list(HealthCheck))
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS, timeout=PATIENCE)

        check()
        tested += 1
    assert tested == (7 if negative else 15)
