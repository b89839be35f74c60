"""A model is served with the chat template that is on record, or not at all."""

from __future__ import annotations

import pytest

from common.chat import check_template, default_template, template_sha256
from common.errors import FailedPrecondition

ONE, OTHER = template_sha256("one"), template_sha256("other")


@pytest.mark.parametrize("recorded", ["", template_sha256(""), ONE])
def test_the_template_on_record_passes_as_does_none(recorded: str) -> None:
    check_template(recorded, ONE)


@pytest.mark.parametrize(("found", "named"), [(OTHER, OTHER[:12]), ("", "none")])
def test_another_template_is_refused_naming_both(found: str, named: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        check_template(ONE, found)
    assert caught.value.reason == "CHAT_TEMPLATE_CHANGED"
    assert ONE[:12] in caught.value.message
    assert named in caught.value.message


def test_of_several_templates_the_default_counts() -> None:
    assert default_template({"default": "a", "tool_use": "b"}) == "a"
    assert default_template("a") == "a"
    assert default_template({"tool_use": "b"}) == default_template(None) == ""
